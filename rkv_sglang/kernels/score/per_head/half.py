# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Scores that share the room out: one half by R-KV (arXiv 2505.24133), the other at random (arXiv 2609.03430).

R-KV's passes over the keys, and in the place of its last step one launch in which a program combines the scores of one
head of one request, finds the best half and draws numbers for the others.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.validation import check_kernel_size, check_mix_lambda, check_threshold
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.attention import run_key_passes
from rkv_sglang.kernels.score.checks import check_score_inputs
from rkv_sglang.kernels.score.config import NUM_STAGES, ScoreConfig
from rkv_sglang.kernels.score.device import BATCH_POINTERS, VARYING_SIZES
from rkv_sglang.kernels.score.per_head.attention import pool_neighbours
from rkv_sglang.kernels.score.pool_pass import POINTER_TYPES
from rkv_sglang.kernels.select import beats_cut, find_cut
from rkv_sglang.kernels.transfer import to_device
from rkv_sglang.policies import random
from rkv_sglang.policies.informed.half import CHOSEN

MULTIPLIER = tl.constexpr(random.MULTIPLIER)
BEST = tl.constexpr(CHOSEN)
# Scores that a program reads at a time.
BLOCK = 1024
NUM_WARPS = 8


@triton.jit
def _mix(numbers):
    """Scramble uint32 numbers, one to one."""
    for _ in tl.static_range(2):
        numbers = (numbers ^ (numbers >> 16)) * MULTIPLIER
    return numbers ^ (numbers >> 16)


@triton.jit(
    do_not_specialize=(*VARYING_SIZES, "seed", "first_layer", "first_kv_head"),
    do_not_specialize_on_alignment=(*BATCH_POINTERS, "prompt_lens_ptr", "budgets_ptr", "logical_lens_ptr"),
)
def share_out_kernel(
    token_indptr_ptr,
    prompt_lens_ptr,
    budgets_ptr,
    logical_lens_ptr,
    attention_ptr,
    exp_sums_ptr,
    scores_ptr,
    num_kv_heads,
    num_tokens,
    num_blocks,
    reach,
    importance_weight,
    redundancy_weight,
    seed,
    first_layer,
    first_kv_head,
    WINDOW: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Score one head of one request. ``scores`` brings the mean of each token's similarities; it is mutated."""
    request = tl.program_id(0)
    layer_head = tl.program_id(1).to(tl.int64)
    first_column = tl.load(token_indptr_ptr + request)
    kv_len = (tl.load(token_indptr_ptr + request + 1) - first_column).to(tl.int32)
    num_scored = kv_len - WINDOW
    row = layer_head * num_tokens + first_column
    first_row = layer_head * num_blocks + first_column // KEY_BLOCK + request
    blocks_here = tl.cdiv(kv_len, KEY_BLOCK)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, blocks_here, BLOCK):
        blocks = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(exp_sums_ptr + first_row + blocks, mask=blocks < blocks_here, other=0.0), axis=0)
    for start in range(0, kv_len, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < kv_len
        means = tl.load(scores_ptr + row + tokens, mask=inside, other=0.0)
        scores = pool_neighbours(attention_ptr + row, tokens, reach, num_scored, BLOCK) * importance_weight
        scores -= redundancy_weight * (tl.exp(means) / total)
        tl.store(scores_ptr + row + tokens, scores, mask=inside)
    tl.debug_barrier()

    prompt_len = tl.load(prompt_lens_ptr + request)
    num_best = (tl.load(budgets_ptr + request) - WINDOW + 1) // 2
    num_candidates = num_scored - prompt_len
    candidates_ptr = scores_ptr + row + prompt_len
    least, equal_left = find_cut(candidates_ptr, num_candidates, num_best, BLOCK)
    logical_len = tl.load(logical_lens_ptr + request).to(tl.uint32)
    layer = (layer_head // num_kv_heads + first_layer).to(tl.uint32)
    head = (layer_head % num_kv_heads + first_kv_head).to(tl.uint32)
    for start in range(0, num_candidates, BLOCK):
        indices = start + tl.arange(0, BLOCK)
        inside = indices < num_candidates
        best, num_equal = beats_cut(candidates_ptr, indices, inside, least, equal_left)
        equal_left -= num_equal
        drawn = _mix(_mix((indices + prompt_len).to(tl.uint32)) ^ logical_len)
        drawn = _mix(_mix(_mix(drawn ^ head) ^ layer) ^ seed.to(tl.uint32))
        scores = tl.where(best == 1, BEST, (drawn >> 8).to(tl.float32) / 16777216.0)
        tl.store(candidates_ptr + indices, scores, mask=inside)
    # Neither is a candidate.
    for start in range(0, prompt_len, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        tl.store(scores_ptr + row + tokens, 0.0, mask=tokens < prompt_len)
    for start in range(num_scored, kv_len, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        tl.store(scores_ptr + row + tokens, float("-inf"), mask=tokens < kv_len)


def half_scores_paged(
    keys: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    *,
    logical_lens: Sequence[int],
    mix_lambda: float,
    kernel_size: int,
    similarity_threshold: float,
    seed: int,
    model: ModelAttention = PLAIN_ATTENTION,
    config: ScoreConfig | None = None,
) -> Tensor:
    """Score every token: ``CHOSEN`` for the best half by R-KV, a drawn number below for the others. Queues no sync.

    Args:
        keys, batch, queries, mix_lambda, kernel_size, similarity_threshold, model, config: As in ``rkv_scores_paged``.
        logical_lens: Tokens ever seen of each request.
        seed: As in ``Half``.

    Returns:
        As ``rkv_scores_paged``; 0 in the prompt.

    Raises:
        ValueError: A shape, dtype, device, stride or value differs from the above.

    Reference: ``rkv_sglang.policies.Half``.
    """
    check_mix_lambda(mix_lambda)
    check_kernel_size(kernel_size)
    check_threshold(similarity_threshold)
    random.check_seed(seed)
    check_score_inputs(keys, batch, queries)
    passes = run_key_passes(
        keys, batch, queries, threshold=similarity_threshold, num_unscored=batch.window, model=model, config=config
    )
    share_out_kernel[(batch.num_requests, keys.num_layers * keys.num_kv_heads)](
        *(batch.token_indptr, batch.prompt_lens, batch.budgets),
        to_device(logical_lens, torch.int64, keys.device),
        *(passes.attention, passes.exp_sums, passes.column_means),
        *(keys.num_kv_heads, batch.num_tokens, passes.num_blocks),
        *(kernel_size // 2, mix_lambda, 1.0 - mix_lambda, seed, keys.first_layer, keys.first_kv_head),
        WINDOW=batch.window,
        KEY_BLOCK=passes.block,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return passes.column_means


_TYPES = POINTER_TYPES | {"prompt_lens_ptr": "*i32", "budgets_ptr": "*i32", "logical_lens_ptr": "*i64", "seed": "i64"}
_TYPES |= {"importance_weight": "fp32", "redundancy_weight": "fp32"}
# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
    (
        "share_out",
        share_out_kernel,
        {
            name: _TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for name in share_out_kernel.arg_names
            if name.islower()
        },
        {"WINDOW": 8, "KEY_BLOCK": 64, "BLOCK": BLOCK},
        NUM_WARPS,
        NUM_STAGES,
    )
]
