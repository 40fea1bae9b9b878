# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""ManifoldKV's score (arXiv 2602.08343): the distance of each key from the mean of its own stretch of the request.

One launch, whatever the number of layers, heads and requests: a program serves one stretch of one head and reads its
keys twice, the second time from the cache of the GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.checks import check_pool
from rkv_sglang.kernels.score.config import NUM_STAGES, NUM_WARPS
from rkv_sglang.kernels.score.device import BATCH_POINTERS, VARYING_SIZES, key_rows, load_tile, squared_norms
from rkv_sglang.kernels.score.pool_pass import aot_constants, pass_constants, pass_signature, tokens_per_program


@triton.jit(do_not_specialize=(*VARYING_SIZES, "mean_tokens"), do_not_specialize_on_alignment=BATCH_POINTERS)
def far_from_mean_kernel(
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
    mean_tokens,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per token of a stretch of ``mean_tokens``: the distance from their mean key; -inf in the window."""
    request = tl.program_id(1)
    layer_head = tl.program_id(2).to(tl.int64)
    layer, head = layer_head // num_kv_heads, layer_head % num_kv_heads
    first_column = tl.load(token_indptr_ptr + request)
    kv_len = (tl.load(token_indptr_ptr + request + 1) - first_column).to(tl.int32)
    first = tl.program_id(0) * mean_tokens
    if first >= kv_len:
        return
    end = tl.minimum(first + mean_tokens, kv_len)
    base = tl.load(key_ptrs + layer).to(tl.pointer_type(ELEMENT)) + head * stride_head
    page_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + request)
    scale = tl.load(key_scales_ptr + layer)

    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < end
        rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
        keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3).to(tl.float32)
        total += tl.sum(keys, axis=0)
    mean = total * (scale / (end - first))

    for start in range(first, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < end
        rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
        keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3).to(tl.float32)
        # Dimensions past head_dim are 0 in both.
        scores = tl.sqrt_rn(squared_norms(keys * scale - mean[None, :]))
        scores = tl.where(tokens < kv_len - WINDOW, scores, float("-inf"))
        tl.store(scores_ptr + layer_head * num_tokens + first_column + tokens, scores, mask=inside)


def manifoldkv_scores_paged(
    keys: PagedBuffers, batch: PagedBatch, *, mean_tokens: int, block: int | None = None
) -> Tensor:
    """Score every token by the distance of its key from the mean of its own ``mean_tokens`` keys. Queues no sync.

    Args:
        keys: Keys of all layers, as cached.
        batch: The requests; ``batch.window`` is the window.
        mean_tokens: Tokens of a stretch, 1 or more; a request's first begins with its first token.
        block: Keys that a program reads at a time, a power of two; default: ``tokens_per_program``.

    Returns:
        ``[num_layers, num_kv_heads, num_tokens]``, fp32, ragged by ``batch.token_indptr``; -inf in the window.

    Raises:
        ValueError: Page sizes or devices differ.

    Reference: ``rkv_sglang.policies.ManifoldKV``.
    """
    check_pool("keys", keys, batch)
    block = block or tokens_per_program(keys.head_dim, keys.dtype)
    shape = (keys.num_layers, keys.num_kv_heads, batch.num_tokens)
    scores = torch.empty(shape, dtype=torch.float32, device=keys.device)
    grid = (triton.cdiv(batch.max_kv_len, mean_tokens), batch.num_requests, keys.num_layers * keys.num_kv_heads)
    far_from_mean_kernel[grid](
        *(keys.pointers, keys.scales, batch.kv_indptr, batch.kv_indices, batch.token_indptr, scores),
        *(keys.num_kv_heads, batch.num_tokens),
        *(keys.stride_page, keys.stride_slot, keys.stride_head, mean_tokens),
        **pass_constants(keys, block, window=batch.window),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return scores


# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
    (
        f"far_from_mean_{name}_d{head_dim}",
        far_from_mean_kernel,
        pass_signature(far_from_mean_kernel),
        aot_constants(dtype, head_dim) | {"WINDOW": 8},
        NUM_WARPS,
        NUM_STAGES,
    )
    for name, dtype, head_dim in (
        ("bf16", torch.bfloat16, 128),
        ("bf16", torch.bfloat16, 256),
        ("fp32", torch.float32, 256),
        ("e5m2", torch.float8_e5m2, 80),
    )
]
