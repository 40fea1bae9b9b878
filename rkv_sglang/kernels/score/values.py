# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""LongFlow's score (arXiv 2603.11504): the attention of the newest query times the size of what it fetches.

The passes over the keys are those of R-KV, with the heads of the query group in the place of the window's queries, so
that each has a softmax of its own; one more kernel reads the values.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.attention import run_key_passes
from rkv_sglang.kernels.score.checks import check_pool, check_score_inputs
from rkv_sglang.kernels.score.config import MAX_WINDOW, NUM_STAGES, NUM_WARPS, ScoreConfig
from rkv_sglang.kernels.score.device import (
    BATCH_POINTERS,
    VARYING_SIZES,
    block_of_program,
    key_rows,
    load_tile,
    place_of_program,
)
from rkv_sglang.kernels.score.pool_pass import (
    aot_constants,
    pass_constants,
    pass_signature,
    tokens_per_program,
)


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def weigh_by_values_kernel(
    key_ptrs,
    key_scales_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    scores_ptr,
    num_kv_heads,
    num_tokens,
    stride_page,
    stride_slot,
    stride_head,
    group_size,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per token: mean attention times ``group_size`` times the value's 1-norm, in place; -inf in the window.

    ``key_ptrs`` and ``key_scales_ptr`` are those of the values.
    """
    _, layer_head, layer, head, first_column, kv_len, start = place_of_program(token_indptr_ptr, num_kv_heads, BLOCK)
    if start >= kv_len:
        return
    base, page_ptr, scale, tokens, inside = block_of_program(
        key_ptrs, key_scales_ptr, kv_indptr_ptr, kv_indices_ptr, layer, head, kv_len, stride_head, ELEMENT, BLOCK
    )
    columns = layer_head * num_tokens + first_column + tokens
    rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
    values = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3).to(tl.float32)
    attention = tl.load(scores_ptr + columns, mask=inside, other=0.0)
    scores = attention * group_size * (tl.sum(tl.abs(values), axis=1) * scale)
    tl.store(scores_ptr + columns, tl.where(tokens < kv_len - WINDOW, scores, float("-inf")), mask=inside)


def longflow_scores_paged(
    keys: PagedBuffers,
    values: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    *,
    model: ModelAttention = PLAIN_ATTENTION,
    config: ScoreConfig | None = None,
    block: int | None = None,
) -> Tensor:
    """Score every token by the newest query's attention, summed over its group, times its value's 1-norm. No sync.

    Args:
        keys, batch, queries, model, config: As in ``rkv_scores_paged``; only the last query of each window is read.
        values: Values of all layers, as cached, in the same pages.
        block: Values of one program, a power of two; default: ``tokens_per_program``.

    Returns:
        As ``rkv_scores_paged``.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or a group has more than 64 heads.

    Reference: ``rkv_sglang.policies.LongFlow``.
    """
    check_score_inputs(keys, batch, queries)
    check_pool("values", values, batch)
    block = block or tokens_per_program(values.head_dim, values.dtype)
    group_size = queries.shape[3] // keys.num_kv_heads
    if group_size > MAX_WINDOW:
        raise ValueError(f"a query group of {group_size} heads: at most {MAX_WINDOW} is supported")
    if (values.num_layers, values.num_kv_heads) != (keys.num_layers, keys.num_kv_heads):
        raise ValueError(
            f"values have {values.num_layers} layers of {values.num_kv_heads} heads and keys {keys.num_layers} of "
            f"{keys.num_kv_heads}: they must be equal"
        )
    # [num_layers, num_requests, group_size, num_kv_heads, head_dim], a view
    num_layers, num_requests, _, _, head_dim = queries.shape
    newest = queries[:, :, -1].view(num_layers, num_requests, keys.num_kv_heads, group_size, head_dim).transpose(2, 3)
    passes = run_key_passes(keys, batch, newest, threshold=None, num_unscored=0, model=model, config=config)
    scores = passes.attention
    grid = (triton.cdiv(batch.max_kv_len, block), num_requests, num_layers * keys.num_kv_heads)
    weigh_by_values_kernel[grid](
        *(values.pointers, values.scales, batch.kv_indptr, batch.kv_indices, batch.token_indptr, scores),
        *(values.num_kv_heads, batch.num_tokens),
        *(values.stride_page, values.stride_slot, values.stride_head, group_size),
        **pass_constants(values, block, window=batch.window),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return scores


# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
    (
        f"weigh_by_values_{name}_d{head_dim}",
        weigh_by_values_kernel,
        pass_signature(weigh_by_values_kernel),
        aot_constants(dtype, head_dim) | {"WINDOW": 8},
        NUM_WARPS,
        NUM_STAGES,
    )
    for name, dtype, head_dim in (
        ("bf16", torch.bfloat16, 128),
        ("fp32", torch.float32, 256),
        ("e4m3", torch.float8_e4m3fn, 128),
    )
]
