# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The two passes of the score that read keys: one sums blocks up, the other uses the totals.

Programs of one launch write disjoint places in any order, with two exceptions: the sums of exempt similarities, which
are added up as integers, and the list of rows that ``scan`` goes on with. So the scores are the same in every run.

Block ``b`` of request ``r`` owns row ``token_indptr[r] // BLOCK + r + b`` of the per-block results: distinct, since a
request of n tokens has at most ``n // BLOCK + 1`` blocks.
"""

import triton
import triton.language as tl

from rkv_sglang.kernels.score.device import (
    BATCH_POINTERS,
    NORM_EPS,
    VARYING_SIZES,
    block_of_program,
    key_rows,
    load_tile,
    place_of_program,
    squared_norms,
    unit_factors,
    window_logits,
)
from rkv_sglang.kernels.score.scan import EXEMPT_ONE, add_exempt, append_rows, newest_near_duplicate


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def summarise_blocks_kernel(
    key_ptrs,
    key_scales_ptr,
    queries_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    key_sums_ptr,
    logit_maxima_ptr,
    logit_sums_ptr,
    factors_ptr,
    left_ptr,
    newest_ptr,
    counts_ptr,
    exempt_ptr,
    num_kv_heads,
    num_tokens,
    num_blocks,
    stride_page,
    stride_slot,
    stride_head,
    stride_query_layer,
    stride_query_request,
    stride_query_token,
    stride_query_head,
    softmax_scale,
    threshold,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    QUERY_ALIGNMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_COLUMNS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_WIDTH: tl.constexpr,
    WITH_REDUNDANCY: tl.constexpr,
    NUM_UNSCORED: tl.constexpr,
    LOGIT_CAP: tl.constexpr,
):
    """Per block of keys: sum of the unit keys, maximum and sum of exp of the logits, and what is exempt in new columns.

    The last ``NUM_UNSCORED`` keys are left out of the softmax. Rows without a near-duplicate among the newest
    ``FIRST_COLUMNS`` are listed in ``left``; ``newest`` gets what each finds there, -1 without one.
    """
    request, layer_head, layer, head, first_column, kv_len, start = place_of_program(
        token_indptr_ptr, num_kv_heads, BLOCK
    )
    if start >= kv_len:
        return
    block_row = layer_head * num_blocks + first_column // BLOCK + request + tl.program_id(0)
    base, page_ptr, scale, tokens, inside = block_of_program(
        key_ptrs, key_scales_ptr, kv_indptr_ptr, kv_indices_ptr, layer, head, kv_len, stride_head, ELEMENT, BLOCK
    )
    rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
    keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3)

    query_ptr = queries_ptr + layer * stride_query_layer + request.to(tl.int64) * stride_query_request
    query_ptr += head * GROUP_SIZE * stride_query_head
    # [BLOCK_W, BLOCK]
    logits = window_logits(
        keys,
        rows,
        inside,
        query_ptr,
        stride_query_token,
        stride_query_head,
        softmax_scale * scale,
        tokens < kv_len - NUM_UNSCORED,
        WINDOW,
        GROUP_SIZE,
        HEAD_DIM,
        BLOCK_W,
        BLOCK_D,
        DOT_WIDTH,
        DOT_DTYPE,
        E4M3,
        QUERY_ALIGNMENT,
        LOGIT_CAP,
    )
    maxima = tl.max(logits, axis=1)
    # A block within the window has no logit: its sum is 0 whatever is subtracted.
    sums = tl.sum(tl.exp(logits - tl.where(maxima == float("-inf"), 0.0, maxima)[:, None]), axis=1)
    steps = tl.arange(0, BLOCK_W)
    tl.store(logit_maxima_ptr + block_row * BLOCK_W + steps, maxima)
    tl.store(logit_sums_ptr + block_row * BLOCK_W + steps, sums)

    if WITH_REDUNDANCY:
        factors = unit_factors(squared_norms(keys), scale)
        dims = tl.arange(0, BLOCK_D)
        tl.store(key_sums_ptr + block_row * BLOCK_D + dims, tl.sum(keys.to(tl.float32) * factors[:, None], axis=0))

        columns = kv_len - FIRST_COLUMNS + tl.arange(0, FIRST_COLUMNS)
        exists = columns >= 0
        column_rows = key_rows(
            base, page_ptr, tl.maximum(columns, 0), exists, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT
        )
        column_keys = load_tile(column_rows, exists, 0, HEAD_DIM, BLOCK_D, E4M3)
        hit, similarity = newest_near_duplicate(
            keys,
            rows,
            tokens,
            inside,
            factors,
            column_keys,
            column_rows,
            columns,
            exists,
            unit_factors(squared_norms(column_keys), scale),
            threshold,
            E4M3,
            DOT_DTYPE,
            HEAD_DIM,
            BLOCK_D,
            DOT_WIDTH,
        )
        first_row = layer_head * num_tokens + first_column
        tl.store(factors_ptr + first_row + tokens, factors, mask=inside)
        add_exempt(exempt_ptr, first_row + hit, similarity, inside & (hit >= 0))
        tl.store(newest_ptr + first_row + tokens, hit, mask=inside)
        # Read again, once all threads have written: Triton 3.6 compiles for Blackwell no second reduction of what a
        # reduction of a product found.
        tl.debug_barrier()
        hit = tl.load(newest_ptr + first_row + tokens, mask=inside, other=0)
        count_ptr = counts_ptr + layer_head * tl.num_programs(1) + request
        append_rows(left_ptr + first_row, count_ptr, tokens, inside & (hit < 0))


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def score_tokens_kernel(
    key_ptrs,
    key_scales_ptr,
    queries_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    key_totals_ptr,
    logit_totals_ptr,
    factors_ptr,
    exempt_ptr,
    attention_ptr,
    column_means_ptr,
    exp_sums_ptr,
    num_kv_heads,
    num_tokens,
    num_blocks,
    stride_page,
    stride_slot,
    stride_head,
    stride_query_layer,
    stride_query_request,
    stride_query_token,
    stride_query_head,
    softmax_scale,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    QUERY_ALIGNMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_WIDTH: tl.constexpr,
    WITH_REDUNDANCY: tl.constexpr,
    NUM_UNSCORED: tl.constexpr,
    LOGIT_CAP: tl.constexpr,
):
    """Per token: the mean attention of the window's queries and the mean of its similarity column.

    The attention of the last ``NUM_UNSCORED`` keys is -inf.
    """
    request, layer_head, layer, head, first_column, kv_len, start = place_of_program(
        token_indptr_ptr, num_kv_heads, BLOCK
    )
    if start >= kv_len:
        return
    base, page_ptr, scale, tokens, inside = block_of_program(
        key_ptrs, key_scales_ptr, kv_indptr_ptr, kv_indices_ptr, layer, head, kv_len, stride_head, ELEMENT, BLOCK
    )
    columns = layer_head * num_tokens + first_column + tokens
    total_row = layer_head * tl.num_programs(1) + request
    rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
    keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3)

    scored = tokens < kv_len - NUM_UNSCORED
    query_ptr = queries_ptr + layer * stride_query_layer + request.to(tl.int64) * stride_query_request
    query_ptr += head * GROUP_SIZE * stride_query_head
    # [BLOCK_W, BLOCK]
    logits = window_logits(
        keys,
        rows,
        inside,
        query_ptr,
        stride_query_token,
        stride_query_head,
        softmax_scale * scale,
        scored,
        WINDOW,
        GROUP_SIZE,
        HEAD_DIM,
        BLOCK_W,
        BLOCK_D,
        DOT_WIDTH,
        DOT_DTYPE,
        E4M3,
        QUERY_ALIGNMENT,
        LOGIT_CAP,
    )
    steps = tl.arange(0, BLOCK_W)
    maxima = tl.load(logit_totals_ptr + total_row * 2 * BLOCK_W + steps)
    sums = tl.load(logit_totals_ptr + (total_row * 2 + 1) * BLOCK_W + steps)
    weights = tl.where(steps < WINDOW, 1.0 / (sums * WINDOW), 0.0)
    attention = tl.sum(tl.exp(logits - maxima[:, None]) * weights[:, None], axis=0)
    tl.store(attention_ptr + columns, tl.where(scored, attention, float("-inf")), mask=inside)

    if WITH_REDUNDANCY:
        factors = tl.load(factors_ptr + columns, mask=inside, other=0.0)
        key_total = tl.load(key_totals_ptr + total_row * BLOCK_D + tl.arange(0, BLOCK_D))
        column_sums = tl.sum(keys.to(tl.float32) * key_total[None, :], axis=1) * factors
        exempt = tl.load(exempt_ptr + columns, mask=inside, other=0).to(tl.float32) / EXEMPT_ONE
        # The length that ``unit_factors`` gives a key: a little below 1, and 0 where there is nothing but zeros.
        length = 1.0 - NORM_EPS * (factors / scale)
        means = (column_sums - length * length - exempt) / kv_len
        tl.store(column_means_ptr + columns, means, mask=inside)
        # Means of cosines are at most about 1: no maximum need be subtracted before exp.
        block_row = layer_head * num_blocks + first_column // BLOCK + request + tl.program_id(0)
        tl.store(exp_sums_ptr + block_row, tl.sum(tl.where(inside, tl.exp(means), 0.0), axis=0))
