# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""From the scores of a batch to the sorted indices of the tokens to keep, in one launch and without a sort.

One program serves one request and head. Scores become integers of the same order, the k-th largest is found bit by
bit, counting how many are at least as large, and what beats it is written in the order of the tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.kernels.paged_batch import PagedBatch

# Scores that a program reads at a time: 8 for each of its threads.
BLOCK = 2048
NUM_WARPS = 8
NUM_STAGES = 2


@triton.jit
def _load_ordered(scores_ptr, indices, inside):
    """Return integers in the order of the scores: NaN above every number, -0.0 equal to 0.0. uint32."""
    scores = tl.load(scores_ptr + indices, mask=inside, other=0.0)
    bits = tl.where(scores == 0.0, 0, scores.to(tl.int32, bitcast=True))
    # Of negative numbers the larger magnitude is the smaller one: turn their other bits round.
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(scores != scores, 0xFFFFFFFF, bits)


@triton.jit
def _count_at_least(scores_ptr, num_candidates, least, BLOCK: tl.constexpr):
    """Return how many candidates' integers are at least ``least``."""
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_candidates, BLOCK):
        indices = start + tl.arange(0, BLOCK)
        inside = indices < num_candidates
        counts += (inside & (_load_ordered(scores_ptr, indices, inside) >= least)).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def find_cut(scores_ptr, num_candidates, num_best, BLOCK: tl.constexpr):
    """Return what cuts off the best ``num_best`` scores: an integer, and how many with exactly that one are kept.

    Scores are compared as ``_load_ordered`` turns them. All above the integer are kept, and the earliest of the others.
    """
    # The largest integer that at least num_best candidates reach: that of the last one kept.
    least = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        count = _count_at_least(scores_ptr, num_candidates, least | bit, BLOCK)
        least = tl.where(count >= num_best, least | bit, least)
        bit = bit >> 1
    beating = tl.where(least == 0xFFFFFFFF, 0, _count_at_least(scores_ptr, num_candidates, least + 1, BLOCK))
    return least, num_best - beating


@triton.jit
def beats_cut(scores_ptr, indices, inside, least, equal_left):
    """Return which of some scores are kept, int32, and how many are exactly at the cut.

    ``equal_left`` is how many of the latter are kept, after those before.
    """
    ordered = _load_ordered(scores_ptr, indices, inside)
    equal = (inside & (ordered == least)).to(tl.int32)
    kept = (inside & (ordered > least)) | ((equal == 1) & (tl.cumsum(equal, axis=0) <= equal_left))
    return kept.to(tl.int32), tl.sum(equal, axis=0)


@triton.jit(
    do_not_specialize=("num_tokens", "kept_width"),
    do_not_specialize_on_alignment=("token_indptr_ptr", "prompt_lens_ptr", "budgets_ptr"),
)
def _select_kept_kernel(
    scores_ptr,
    token_indptr_ptr,
    prompt_lens_ptr,
    budgets_ptr,
    kept_ptr,
    num_kv_heads,
    num_tokens,
    kept_width,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one head's indices of the best ``budget - WINDOW`` candidates of one request and of its window, ascending.

    Fills the row of ``kept_ptr`` up to ``kept_width``, with -1 past the budget.
    """
    request = tl.program_id(0)
    layer_head = tl.program_id(1).to(tl.int64)
    layer, head = layer_head // num_kv_heads, layer_head % num_kv_heads
    first_column = tl.load(token_indptr_ptr + request)
    prompt_len = tl.load(prompt_lens_ptr + request)
    budget = tl.load(budgets_ptr + request)
    num_candidates = (tl.load(token_indptr_ptr + request + 1) - first_column).to(tl.int32) - prompt_len - WINDOW
    num_best = budget - WINDOW
    scores_ptr += layer_head * num_tokens + first_column + prompt_len
    kept_ptr += ((layer * tl.num_programs(0) + request) * num_kv_heads + head) * kept_width

    least, equal_kept = find_cut(scores_ptr, num_candidates, num_best, BLOCK)
    written = tl.full([], 0, tl.int32)
    equal_seen = tl.full([], 0, tl.int32)
    for start in range(0, num_candidates, BLOCK):
        indices = start + tl.arange(0, BLOCK)
        inside = indices < num_candidates
        kept, num_equal = beats_cut(scores_ptr, indices, inside, least, equal_kept - equal_seen)
        places = written + tl.cumsum(kept, axis=0) - 1
        tl.store(kept_ptr + places, indices, mask=kept == 1)
        equal_seen += num_equal
        written += tl.sum(kept, axis=0)

    for start in range(num_best, kept_width, BLOCK):
        places = start + tl.arange(0, BLOCK)
        window_indices = num_candidates + places - num_best
        tl.store(kept_ptr + places, tl.where(places < budget, window_indices, -1), mask=places < kept_width)


def select_kept_paged(scores: Tensor, batch: PagedBatch, *, block: int = BLOCK) -> Tensor:
    """Per layer, request and KV head, the top ``budget - window`` generated tokens before the window, and the window.

    One launch, no sync. NaN ranks above every number.

    Args:
        scores: ``[num_layers, num_kv_heads, batch.num_tokens]``, fp32, contiguous, ragged by ``batch.token_indptr``;
            columns of prompts and windows are not read.
        batch: The requests, with their prompts, budgets and window.
        block: Scores that a program reads at a time, a power of two.

    Returns:
        Indices into the generated tokens (position less prompt_len), ascending, then -1 past a request's own budget,
        ``[num_layers, num_requests, num_kv_heads, batch.max_budget]``, int32. Of equal scores the earlier token wins.

    Raises:
        ValueError: A shape, dtype, stride or device differs from the above.

    Reference: ``rkv_sglang.algorithm.reference.select_kept``.
    """
    if scores.dim() != 3 or 0 in scores.shape or scores.shape[2] != batch.num_tokens:
        raise ValueError(
            f"scores must be [num_layers, num_kv_heads, {batch.num_tokens}], the tokens of batch, "
            f"got {list(scores.shape)}"
        )
    if scores.dtype != torch.float32 or not scores.is_contiguous():
        raise ValueError(f"scores must be contiguous fp32, got {scores.dtype} with strides {list(scores.stride())}")
    if scores.device != batch.device:
        raise ValueError(f"scores are on {scores.device} and batch on {batch.device}: put both on one device")
    num_layers, num_kv_heads, num_tokens = scores.shape
    kept_shape = (num_layers, batch.num_requests, num_kv_heads, batch.max_budget)
    kept_indices = torch.empty(kept_shape, dtype=torch.int32, device=scores.device)
    _select_kept_kernel[(batch.num_requests, num_layers * num_kv_heads)](
        *(scores, batch.token_indptr, batch.prompt_lens, batch.budgets, kept_indices),
        *(num_kv_heads, num_tokens, batch.max_budget),
        WINDOW=batch.window,
        BLOCK=block,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return kept_indices


# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
    (
        "select_kept",
        _select_kept_kernel,
        {
            "scores_ptr": "*fp32",
            "token_indptr_ptr": "*i64",
            "prompt_lens_ptr": "*i32",
            "budgets_ptr": "*i32",
            "kept_ptr": "*i32",
            "num_kv_heads": "i32",
            "num_tokens": "i32",
            "kept_width": "i32",
        },
        {"WINDOW": 8, "BLOCK": BLOCK},
        NUM_WARPS,
        NUM_STAGES,
    )
]
