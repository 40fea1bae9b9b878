# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""G-KV's score (arXiv 2512.00504): each query head has a softmax of its own, and what a token got is remembered.

R-KV's passes over the keys find how redundant they are. In one launch more, in the place of R-KV's last step, a program
serves one head of one request from the denominators of its softmaxes to its scores.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.validation import check_kernel_size, check_threshold
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.attention import run_key_passes
from rkv_sglang.kernels.score.checks import check_score_inputs
from rkv_sglang.kernels.score.config import NUM_STAGES, ScoreConfig, choose_factor_dtype, score_config
from rkv_sglang.kernels.score.device import BATCH_POINTERS, VARYING_SIZES
from rkv_sglang.kernels.score.per_head.attention import (
    attend_per_head,
    head_case,
    head_constants,
    num_warps,
    pool_neighbours,
    query_alignment,
)


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def score_by_memory_kernel(
    key_ptrs,
    key_scales_ptr,
    queries_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    attention_ptr,
    log_sums_ptr,
    scores_ptr,
    state_ptr,
    num_kv_heads,
    num_tokens,
    stride_page,
    stride_slot,
    stride_head,
    stride_query_layer,
    stride_query_request,
    stride_query_token,
    stride_query_head,
    softmax_scale,
    importance_weight,
    decay,
    reach,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    QUERY_ALIGNMENT: tl.constexpr,
    LOGIT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_WIDTH: tl.constexpr,
):
    """Score one head of one request.

    ``scores`` brings the mean of each token's similarities and ``state`` what the last compaction left, or -inf; both
    are mutated. ``attention`` and ``log_sums`` are this program's own to write to.
    """
    request = tl.program_id(0)
    layer_head = tl.program_id(1).to(tl.int64)
    first_column = tl.load(token_indptr_ptr + request)
    kv_len = (tl.load(token_indptr_ptr + request + 1) - first_column).to(tl.int32)
    num_scored = kv_len - WINDOW
    row = layer_head * num_tokens + first_column
    attend_per_head(
        key_ptrs,
        key_scales_ptr,
        queries_ptr,
        kv_indptr_ptr,
        kv_indices_ptr,
        attention_ptr + row,
        log_sums_ptr,
        num_kv_heads,
        num_scored,
        stride_page,
        stride_slot,
        stride_head,
        stride_query_layer,
        stride_query_request,
        stride_query_token,
        stride_query_head,
        softmax_scale,
        ELEMENT,
        E4M3,
        DOT_DTYPE,
        PAGE_SIZE,
        ALIGNMENT,
        QUERY_ALIGNMENT,
        LOGIT_CAP,
        WINDOW,
        GROUP_SIZE,
        HEAD_DIM,
        BLOCK,
        BLOCK_W,
        BLOCK_D,
        DOT_WIDTH,
        False,
    )
    tl.debug_barrier()

    most = tl.full([], float("-inf"), tl.float32)
    most_similar = tl.full([], float("-inf"), tl.float32)
    for start in range(0, kv_len, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        pooled = pool_neighbours(attention_ptr + row, tokens, reach, num_scored, BLOCK)
        most = tl.maximum(most, tl.max(pooled, axis=0))
        similar = tl.load(scores_ptr + row + tokens, mask=tokens < kv_len, other=float("-inf"))
        most_similar = tl.maximum(most_similar, tl.max(similar, axis=0))
    for start in range(0, kv_len, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < kv_len
        pooled = pool_neighbours(attention_ptr + row, tokens, reach, num_scored, BLOCK)
        before = tl.load(state_ptr + row + tokens, mask=inside, other=float("-inf"))
        # Where a key is no number, neither is what was made of it: nothing older is to hide that.
        state = tl.maximum(pooled / most, decay * before, propagate_nan=tl.PropagateNan.ALL)
        similar = tl.load(scores_ptr + row + tokens, mask=inside, other=0.0)
        scores = importance_weight * state - (1.0 - importance_weight) * tl.exp(similar - most_similar)
        scores = tl.where(tokens < num_scored, scores, float("-inf"))
        tl.store(state_ptr + row + tokens, state, mask=tokens < num_scored)
        tl.store(scores_ptr + row + tokens, scores, mask=inside)


def gkv_scores_paged(
    keys: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    state: Tensor,
    *,
    importance_weight: float,
    decay: float,
    kernel_size: int,
    similarity_threshold: float,
    model: ModelAttention = PLAIN_ATTENTION,
    config: ScoreConfig | None = None,
) -> Tensor:
    """Score every token by remembered attention and redundancy. Queues no sync.

    Args:
        keys, batch, queries, kernel_size, similarity_threshold, model, config: As in ``rkv_scores_paged``.
        state: What the last compaction left of each token, -inf where it left nothing,
            ``[num_layers, num_kv_heads, num_tokens]``, fp32, contiguous. Mutated: what this one leaves, outside of the
            window.
        importance_weight, decay: As in ``GKV``.

    Returns:
        As ``rkv_scores_paged``.

    Raises:
        ValueError: A shape, dtype, device, stride or value differs from the above.

    Reference: ``rkv_sglang.policies.GKV``.
    """
    check_kernel_size(kernel_size)
    check_threshold(similarity_threshold)
    check_score_inputs(keys, batch, queries)
    num_layers, num_requests, window, num_qo_heads, head_dim = queries.shape
    # How redundant keys are does not depend on queries: one is enough.
    passes = run_key_passes(
        keys,
        batch,
        queries[:, :, -1:],
        threshold=similarity_threshold,
        num_unscored=window,
        model=model,
        config=config,
    )
    factor_dtype = choose_factor_dtype(keys.dtype, queries.dtype)
    config = config or score_config(head_dim, keys.dtype, factor_dtype)
    constants = head_constants(
        keys, queries.dtype, query_alignment(queries), num_qo_heads, window, model.logit_cap, config
    )
    num_heads = num_layers * keys.num_kv_heads
    log_sums = torch.empty(
        (num_heads, num_requests, constants["GROUP_SIZE"], constants["BLOCK_W"]),
        dtype=torch.float32,
        device=keys.device,
    )
    score_by_memory_kernel[(num_requests, num_heads)](
        *(keys.pointers, keys.scales, queries, batch.kv_indptr, batch.kv_indices, batch.token_indptr),
        *(passes.attention, log_sums, passes.column_means, state),
        *(keys.num_kv_heads, batch.num_tokens, keys.stride_page, keys.stride_slot, keys.stride_head),
        *queries.stride()[:4],
        *(model.scale_for(head_dim), importance_weight, decay, kernel_size // 2),
        **constants,
        num_warps=num_warps(config, factor_dtype, window),
        num_stages=NUM_STAGES,
    )
    return passes.column_means


# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
    head_case(score_by_memory_kernel, dtype, query_dtype, head_dim, window=window)
    for dtype, query_dtype, head_dim, window in (
        (torch.bfloat16, torch.bfloat16, 64, 16),
        (torch.bfloat16, torch.bfloat16, 128, 16),
        (torch.bfloat16, torch.bfloat16, 128, 64),
        (torch.bfloat16, torch.bfloat16, 256, 16),
        (torch.float32, torch.float32, 128, 16),
        (torch.float8_e4m3fn, torch.bfloat16, 128, 16),
    )
]
