# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The scan for each row's most recent near-duplicate, past the newest columns that all rows meet.

Rows that are left come in lists, so that full tiles of them are compared. In what order they stand there differs from
run to run; what each finds does not, and similarities are added up as integers: so the sums are the same in every run.

Where a request has ``PromptHits``, rows scan the generated columns only. A prompt row without a hit there takes what it
found within the prompt. A generated row scans the prompt, but for the columns that were compared with it before: a
prompt token whose newest hit is older than the row is none of the row's near-duplicates.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.kernels.paged_batch import PagedBatch
from rkv_sglang.kernels.score.device import (
    BATCH_POINTERS,
    VARYING_SIZES,
    dot_rows,
    key_rows,
    load_tile,
    place_of_program,
)
from rkv_sglang.kernels.transfer import to_device

# Similarities are summed as integers of this unit, exactly and so in any order.
EXEMPT_ONE = tl.constexpr(2.0**32)
# What a launch scans: prompt rows the prompt, to fill ``PromptHits``; all rows that are left the generated columns, or
# all columns without ``PromptHits``; generated rows that are left even so the prompt.
SCAN_WITHIN_PROMPT = tl.constexpr(0)
SCAN_GENERATED = tl.constexpr(1)
SCAN_PROMPT = tl.constexpr(2)


@triton.jit
def newest_near_duplicate(
    keys,
    rows,
    tokens,
    inside,
    factors,
    column_keys,
    column_rows,
    columns,
    exists,
    column_factors,
    threshold,
    E4M3: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_WIDTH: tl.constexpr,
):
    """Return each row's newest of ``columns`` above the threshold, -1 without one, and the similarity there.

    Column 0 is one whatever its similarity: a row that finds nothing exempts it.
    """
    # [rows, columns]
    similarity = dot_rows(
        keys, column_keys, rows, inside, column_rows, exists, HEAD_DIM, BLOCK_D, DOT_WIDTH, DOT_DTYPE, E4M3
    )
    similarity *= factors[:, None] * column_factors[None, :]
    similarity = tl.where(tokens[:, None] == columns[None, :], 0.0, similarity)
    above = ((similarity > threshold) | (columns == 0)[None, :]) & exists[None, :]
    hit = tl.max(tl.where(above, columns[None, :], -1), axis=1)
    return hit, tl.sum(tl.where(columns[None, :] == hit[:, None], similarity, 0.0), axis=1)


@triton.jit
def add_exempt(exempt_ptr, columns, similarity, mask):
    """Add to each row's exempt column what it exempts there."""
    tl.atomic_add(exempt_ptr + columns, (similarity * EXEMPT_ONE).to(tl.int64), mask=mask, sem="relaxed")


@triton.jit
def append_rows(list_ptr, count_ptr, tokens, chosen):
    """Append the chosen tokens to a list that other programs append to as well."""
    ones = chosen.to(tl.int32)
    number = tl.sum(ones, axis=0)
    if number > 0:
        first = tl.atomic_add(count_ptr, number.to(tl.int64), sem="relaxed")
        tl.store(list_ptr + first + tl.cumsum(ones, axis=0) - 1, tokens, mask=chosen)


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def scan_rows_kernel(
    key_ptrs,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    prompt_lens_ptr,
    hits_ptrs,
    factors_ptr,
    left_ptr,
    newest_ptr,
    counts_ptr,
    exempt_ptr,
    num_kv_heads,
    num_tokens,
    stride_page,
    stride_slot,
    stride_head,
    threshold,
    kind,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    FIRST_COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_WIDTH: tl.constexpr,
    KNOWN_WIDTH: tl.constexpr,
):
    """Scan for a tile of rows, from the newest column on until all have a hit.

    ``factors`` make raw keys unit keys. ``left`` lists the rows that found nothing among the newest ``FIRST_COLUMNS``.
    ``newest`` holds the newest hit of each prompt token, -1 without one, and behind those the list of generated rows
    that are left to scan the prompt. ``counts`` has the lengths of both lists, ``[2, layers and heads, requests]``.
    ``hits_ptrs`` has the address of each request's ``PromptHits``, or 0.
    """
    request, layer_head, layer, head, first_column, kv_len, start = place_of_program(
        token_indptr_ptr, num_kv_heads, BLOCK
    )
    prompt_len = tl.load(prompt_lens_ptr + request)
    hits_address = tl.load(hits_ptrs + request)
    within_prompt, generated, prompt = kind == SCAN_WITHIN_PROMPT, kind == SCAN_GENERATED, kind == SCAN_PROMPT
    count_ptr = counts_ptr + layer_head * tl.num_programs(1) + request
    later_count_ptr = count_ptr + tl.num_programs(2).to(tl.int64) * tl.num_programs(1)
    num_listed = tl.load(count_ptr, mask=generated, other=0) + tl.load(later_count_ptr, mask=prompt, other=0)
    num_rows = tl.where(within_prompt, tl.where(hits_address != 0, prompt_len, 0), num_listed.to(tl.int32))
    if start >= num_rows:
        return
    first_row = layer_head * num_tokens + first_column
    later_ptr = newest_ptr + first_row + prompt_len
    places = start + tl.arange(0, BLOCK)
    inside = places < num_rows
    tokens = tl.load(left_ptr + first_row + places, mask=inside & generated, other=0)
    tokens += tl.load(later_ptr + places, mask=inside & prompt, other=0)
    tokens = tl.where(within_prompt, places, tokens)

    base = tl.load(key_ptrs + layer).to(tl.pointer_type(ELEMENT)) + head * stride_head
    page_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + request)
    rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
    keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3)
    factors = tl.load(factors_ptr + first_row + tokens, mask=inside, other=0.0)

    oldest = tl.min(tl.where(inside, tokens, kv_len), axis=0)
    stop = tl.where(generated & (hits_address != 0), prompt_len, 0)
    end = tl.where(generated, kv_len - FIRST_COLUMNS, prompt_len)
    # -1: no near-duplicate yet. Rows that do not exist are done.
    newest = tl.where(inside, -1, 0)
    exempt = tl.zeros([BLOCK], tl.float32)
    while (end > stop) & (tl.min(newest, axis=0) < 0):
        columns = end - BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        exists = columns >= stop
        newest_of_columns = tl.load(newest_ptr + first_row + columns, mask=exists & prompt, other=-1)
        if (kind != SCAN_PROMPT) | (tl.max(newest_of_columns, axis=0) >= oldest):
            column_rows = key_rows(
                base, page_ptr, tl.maximum(columns, 0), exists, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT
            )
            hit, similarity = newest_near_duplicate(
                keys,
                rows,
                tokens,
                inside,
                factors,
                load_tile(column_rows, exists, 0, HEAD_DIM, BLOCK_D, E4M3),
                column_rows,
                columns,
                exists,
                tl.load(factors_ptr + first_row + columns, mask=exists, other=0.0),
                threshold,
                E4M3,
                DOT_DTYPE,
                HEAD_DIM,
                BLOCK_D,
                DOT_WIDTH,
            )
            # Columns of later rounds are older.
            exempt = tl.where(newest < 0, similarity, exempt)
            newest = tl.maximum(newest, hit)
        end -= BLOCK_COLUMNS

    in_prompt = inside & (tokens < prompt_len)
    hits_ptr = hits_address.to(tl.pointer_type(tl.int32)) + layer_head * prompt_len + tokens
    if kind == SCAN_WITHIN_PROMPT:
        tl.store(hits_ptr, tl.maximum(newest, 0), mask=inside)
        return
    if kind == SCAN_GENERATED:
        tl.store(newest_ptr + first_row + tokens, newest, mask=in_prompt)
        append_rows(later_ptr, later_count_ptr, tokens, inside & (newest < 0) & (tokens >= prompt_len))

    # What the prompt is known to have: its own hits, and column 0 for generated rows that found nothing anywhere.
    known = inside & (newest < 0) & (in_prompt | (kind == SCAN_PROMPT))
    if tl.max(known.to(tl.int32), axis=0) > 0:
        columns = tl.load(hits_ptr, mask=known & in_prompt, other=0)
        column_rows = key_rows(base, page_ptr, columns, known, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
        dots = tl.zeros([BLOCK], tl.float32)
        for first in range(0, HEAD_DIM, KNOWN_WIDTH):
            left = load_tile(rows, known, first, HEAD_DIM, KNOWN_WIDTH, E4M3).to(tl.float32)
            right = load_tile(column_rows, known, first, HEAD_DIM, KNOWN_WIDTH, E4M3).to(tl.float32)
            dots += tl.sum(left * right, axis=1)
        column_factors = tl.load(factors_ptr + first_row + columns, mask=known, other=0.0)
        similarity = tl.where(columns == tokens, 0.0, dots * factors * column_factors)
        exempt = tl.where(known, similarity, exempt)
        newest = tl.where(known, columns, newest)
    add_exempt(exempt_ptr, first_row + newest, exempt, inside & (newest >= 0))


def scan_lists(
    batch: PagedBatch, attention: Tensor, column_means: Tensor, *, with_redundancy: bool
) -> dict[str, Tensor | None]:
    """Return the arguments by which the first pass over the keys hands rows on to the scan, its counts and sums 0.

    Args:
        attention, column_means: Results of the second pass over the keys, ``[num_layers, num_kv_heads, num_tokens]``,
            fp32: until it writes them, the lists lie there.
    """
    names = ("factors_ptr", "left_ptr", "newest_ptr", "counts_ptr", "exempt_ptr")
    if not with_redundancy:
        return dict.fromkeys(names)
    # An even number of counts, so that what follows them is aligned as well.
    num_counts = 2 * attention.shape[0] * attention.shape[1] * batch.num_requests
    zeros = torch.zeros(num_counts + attention.numel(), dtype=torch.int64, device=attention.device)
    factors = torch.empty(attention.shape, dtype=torch.float32, device=attention.device)
    lists = (factors, attention.view(torch.int32), column_means.view(torch.int32), zeros[:num_counts])
    return dict(zip(names, (*lists, zeros[num_counts:]), strict=True))


def scan_rows(
    arguments: dict[str, Any],
    grid: tuple[int, int, int],
    prompt_hits: Sequence[PromptHits | None],
    device: torch.device,
) -> None:
    """Find what is exempt for the rows that the newest columns left; fill the ``prompt_hits`` that are not filled."""
    num_requests = grid[1]
    hits = [0 if own is None else own.columns.data_ptr() for own in prompt_hits]
    to_fill = [0 if own is None or own.is_filled else own.columns.data_ptr() for own in prompt_hits]
    addresses = to_device([*hits, *to_fill], torch.int64, device)
    kinds = [SCAN_WITHIN_PROMPT] * any(to_fill) + [SCAN_GENERATED] + [SCAN_PROMPT] * any(hits)
    for kind in kinds:
        own = addresses[num_requests:] if kind is SCAN_WITHIN_PROMPT else addresses
        scan_rows_kernel[grid](**arguments, hits_ptrs=own, kind=kind.value)
