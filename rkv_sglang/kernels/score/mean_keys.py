# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""KeyDiff's score (arXiv 2504.15364): each key is held against the mean direction of all.

Three kernels, whatever the number of layers, heads and requests: sums of blocks of keys, their total, and a second pass
over the keys. Both passes read every key once; no queries are read.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.checks import check_pool
from rkv_sglang.kernels.score.config import CHUNK, NUM_STAGES, NUM_WARPS, padded_head_dim
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
)
from rkv_sglang.kernels.score.pool_pass import (
    aot_constants,
    pass_constants,
    pass_signature,
    tokens_per_program,
)


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def sum_keys_kernel(
    key_ptrs,
    key_scales_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    key_sums_ptr,
    num_kv_heads,
    num_blocks,
    stride_page,
    stride_slot,
    stride_head,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per block: the sum of the unit keys."""
    request, layer_head, layer, head, first_column, kv_len, start = place_of_program(
        token_indptr_ptr, num_kv_heads, BLOCK
    )
    if start >= kv_len:
        return
    base, page_ptr, scale, tokens, inside = block_of_program(
        key_ptrs, key_scales_ptr, kv_indptr_ptr, kv_indices_ptr, layer, head, kv_len, stride_head, ELEMENT, BLOCK
    )
    rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
    keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3).to(tl.float32)
    keys = keys * unit_factors(squared_norms(keys), scale)[:, None]
    block_row = layer_head * num_blocks + first_column // BLOCK + request + tl.program_id(0)
    tl.store(key_sums_ptr + block_row * BLOCK_D + tl.arange(0, BLOCK_D), tl.sum(keys, axis=0))


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def mean_keys_kernel(
    token_indptr_ptr,
    key_sums_ptr,
    means_ptr,
    num_blocks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per request and head: the direction of the mean of the unit keys."""
    request = tl.program_id(0)
    layer_head = tl.program_id(1).to(tl.int64)
    first_column = tl.load(token_indptr_ptr + request)
    kv_len = (tl.load(token_indptr_ptr + request + 1) - first_column).to(tl.int32)
    blocks_here = tl.cdiv(kv_len, BLOCK)
    first_row = layer_head * num_blocks + first_column // BLOCK + request
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, blocks_here, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        offsets = (first_row + blocks)[:, None] * BLOCK_D + dims[None, :]
        total += tl.sum(tl.load(key_sums_ptr + offsets, mask=(blocks < blocks_here)[:, None], other=0.0), axis=0)
    mean = total / kv_len
    mean = mean / (tl.sqrt_rn(tl.sum(mean * mean, axis=0)) + NORM_EPS)
    tl.store(means_ptr + (layer_head * tl.num_programs(0) + request) * BLOCK_D + dims, mean)


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def compare_keys_kernel(
    key_ptrs,
    key_scales_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    means_ptr,
    scores_ptr,
    num_kv_heads,
    num_tokens,
    stride_page,
    stride_slot,
    stride_head,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per token: minus the cosine with the mean direction; -inf in the window."""
    request, layer_head, layer, head, first_column, kv_len, start = place_of_program(
        token_indptr_ptr, num_kv_heads, BLOCK
    )
    if start >= kv_len:
        return
    base, page_ptr, scale, tokens, inside = block_of_program(
        key_ptrs, key_scales_ptr, kv_indptr_ptr, kv_indices_ptr, layer, head, kv_len, stride_head, ELEMENT, BLOCK
    )
    dims = tl.arange(0, BLOCK_D)
    rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
    keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3).to(tl.float32)
    mean = tl.load(means_ptr + (layer_head * tl.num_programs(1) + request) * BLOCK_D + dims)
    scores = -tl.sum(keys * mean[None, :], axis=1) * unit_factors(squared_norms(keys), scale)
    scores = tl.where(tokens < kv_len - WINDOW, scores, float("-inf"))
    tl.store(scores_ptr + layer_head * num_tokens + first_column + tokens, scores, mask=inside)


def keydiff_scores_paged(keys: PagedBuffers, batch: PagedBatch, *, block: int | None = None) -> Tensor:
    """Score every token by minus the cosine of its key with the mean direction of its request's keys. Queues no sync.

    Args:
        keys: Keys of all layers, as cached.
        batch: The requests; ``batch.window`` is the window.
        block: Keys of one program, a power of two; default: ``tokens_per_program``.

    Returns:
        ``[num_layers, num_kv_heads, num_tokens]``, fp32, ragged by ``batch.token_indptr``; -inf in the window.

    Raises:
        ValueError: Page sizes or devices differ.

    Reference: ``rkv_sglang.policies.KeyDiff``.
    """
    check_pool("keys", keys, batch)
    block = block or tokens_per_program(keys.head_dim, keys.dtype)
    num_heads, num_tokens = keys.num_layers * keys.num_kv_heads, batch.num_tokens
    num_blocks = num_tokens // block + batch.num_requests
    constants = pass_constants(keys, block)
    block_d = constants["BLOCK_D"]

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=keys.device)

    scores = fp32(keys.num_layers, keys.num_kv_heads, num_tokens)
    key_sums, means = fp32(num_heads, num_blocks, block_d), fp32(num_heads, batch.num_requests, block_d)
    pool = (keys.pointers, keys.scales, batch.kv_indptr, batch.kv_indices, batch.token_indptr)
    strides = (keys.stride_page, keys.stride_slot, keys.stride_head)
    grid = (triton.cdiv(batch.max_kv_len, block), batch.num_requests, num_heads)
    shape = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
    sum_keys_kernel[grid](*pool, key_sums, keys.num_kv_heads, num_blocks, *strides, **constants, **shape)
    mean_keys_kernel[(batch.num_requests, num_heads)](
        *(batch.token_indptr, key_sums, means, num_blocks),
        BLOCK=block,
        CHUNK=CHUNK,
        BLOCK_D=block_d,
        **shape,
    )
    sizes = (keys.num_kv_heads, num_tokens)
    compare_keys_kernel[grid](*pool, means, scores, *sizes, *strides, WINDOW=batch.window, **constants, **shape)
    return scores


_Case = tuple[str, Any, dict[str, str], dict[str, Any], int, int]


def _cases(dtype: torch.dtype, head_dim: int) -> list[_Case]:
    constants = aot_constants(dtype, head_dim)
    mean = {"BLOCK": constants["BLOCK"], "CHUNK": CHUNK, "BLOCK_D": padded_head_dim(head_dim)}
    kernels = ((sum_keys_kernel, constants), (mean_keys_kernel, mean), (compare_keys_kernel, constants | {"WINDOW": 8}))
    suffix = f"{str(dtype).removeprefix('torch.')}_d{head_dim}"
    cases: list[_Case] = []
    for kernel, own in kernels:
        name = f"{kernel.__name__.removesuffix('_kernel')}_{suffix}"
        cases.append((name, kernel, pass_signature(kernel), own, NUM_WARPS, NUM_STAGES))
    return cases


# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[_Case] = [
    case
    for dtype, head_dim in (
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float32, 256),
        (torch.float8_e4m3fn, 128),
        (torch.float8_e5m2, 80),
    )
    for case in _cases(dtype, head_dim)
]
