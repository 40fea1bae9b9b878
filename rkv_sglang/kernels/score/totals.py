# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The two passes of the score that read no keys: block sums to totals, and the parts of the score to the score."""

import triton
import triton.language as tl

from rkv_sglang.kernels.score.device import BATCH_POINTERS, VARYING_SIZES


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def reduce_blocks_kernel(
    token_indptr_ptr,
    key_sums_ptr,
    logit_maxima_ptr,
    logit_sums_ptr,
    key_totals_ptr,
    logit_totals_ptr,
    num_blocks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_REDUNDANCY: tl.constexpr,
):
    """Per request and head: the sum of the unit keys, and the logarithm of each softmax's denominator."""
    request = tl.program_id(0)
    layer_head = tl.program_id(1).to(tl.int64)
    first_column = tl.load(token_indptr_ptr + request)
    blocks_here = tl.cdiv(tl.load(token_indptr_ptr + request + 1) - first_column, BLOCK).to(tl.int32)
    first_row = layer_head * num_blocks + first_column // BLOCK + request
    steps = tl.arange(0, BLOCK_W)
    dims = tl.arange(0, BLOCK_D)
    maxima = tl.full([BLOCK_W], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_W], tl.float32)
    key_total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, blocks_here, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        exists = (blocks < blocks_here)[:, None]
        offsets = (first_row + blocks)[:, None] * BLOCK_W + steps[None, :]
        block_maxima = tl.load(logit_maxima_ptr + offsets, mask=exists, other=float("-inf"))
        block_sums = tl.load(logit_sums_ptr + offsets, mask=exists, other=0.0)
        larger = tl.maximum(maxima, tl.max(block_maxima, axis=0))
        # -inf less -inf is NaN: until a logit is seen, subtract 0.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        sums = sums * tl.exp(maxima - shift) + tl.sum(block_sums * tl.exp(block_maxima - shift[None, :]), axis=0)
        maxima = larger
        if WITH_REDUNDANCY:
            offsets = (first_row + blocks)[:, None] * BLOCK_D + dims[None, :]
            key_total += tl.sum(tl.load(key_sums_ptr + offsets, mask=exists, other=0.0), axis=0)
    total_row = layer_head * tl.num_programs(0) + request
    tl.store(logit_totals_ptr + total_row * 2 * BLOCK_W + steps, tl.where(maxima == float("-inf"), 0.0, maxima))
    tl.store(logit_totals_ptr + (total_row * 2 + 1) * BLOCK_W + steps, sums)
    if WITH_REDUNDANCY:
        tl.store(key_totals_ptr + total_row * BLOCK_D + dims, key_total)


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def combine_scores_kernel(
    token_indptr_ptr,
    attention_ptr,
    exp_sums_ptr,
    scores_ptr,
    num_tokens,
    num_blocks,
    reach,
    importance_weight,
    redundancy_weight,
    WINDOW: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
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
        first_row = layer_head * num_blocks + first_column // KEY_BLOCK + request
        blocks_here = tl.cdiv(kv_len, KEY_BLOCK)
        totals = tl.zeros([CHUNK], tl.float32)
        for chunk_start in range(0, blocks_here, CHUNK):
            blocks = chunk_start + tl.arange(0, CHUNK)
            totals += tl.load(exp_sums_ptr + first_row + blocks, mask=blocks < blocks_here, other=0.0)
        means = tl.load(scores_ptr + row + tokens, mask=inside, other=0.0)
        scores -= redundancy_weight * (tl.exp(means) / tl.sum(totals, axis=0))
    scores = tl.where(tokens < kv_len - WINDOW, scores, float("-inf"))
    tl.store(scores_ptr + row + tokens, scores, mask=inside)
