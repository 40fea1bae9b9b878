# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The last step of the score, which reads no keys: attention is pooled and redundancy subtracted."""

import triton
import triton.language as tl

from rkv_sglang.kernels.score.device import BATCH_POINTERS, VARYING_SIZES


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def combine_scores_kernel(
    token_indptr_ptr,
    attention_ptr,
    exp_sums_ptr,
    scores_ptr,
    num_tokens,
    reach,
    importance_weight,
    redundancy_weight,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_REDUNDANCY: tl.constexpr,
):
    """Per token: max-pool the attention, subtract the redundancy. ``scores`` brings the column means; it is mutated."""
    request = tl.program_id(1)
    layer_head = tl.program_id(2).to(tl.int64)
    first_column = tl.load(token_indptr_ptr + request)
    kv_len = (tl.load(token_indptr_ptr + request + 1) - first_column).to(tl.int32)
    start = tl.program_id(0) * BLOCK
    if start >= kv_len:
        return
    tokens = start + tl.arange(0, BLOCK)
    inside = tokens < kv_len
    row = layer_head * num_tokens + first_column
    pooled = tl.full([BLOCK], float("-inf"), tl.float32)
    for offset in range(-reach, reach + 1):
        neighbours = tokens + offset
        # The window holds -inf, so it is padding like the places outside.
        exists = (neighbours >= 0) & (neighbours < kv_len)
        attention = tl.load(attention_ptr + row + neighbours, mask=exists, other=float("-inf"))
        pooled = tl.maximum(pooled, attention, propagate_nan=tl.PropagateNan.ALL)
    scores = pooled * importance_weight
    if WITH_REDUNDANCY:
        exp_sum = tl.load(exp_sums_ptr + layer_head * tl.num_programs(1) + request)
        means = tl.load(scores_ptr + row + tokens, mask=inside, other=0.0)
        scores -= redundancy_weight * (tl.exp(means) / exp_sum)
    scores = tl.where(tokens < kv_len - WINDOW, scores, float("-inf"))
    tl.store(scores_ptr + row + tokens, scores, mask=inside)
