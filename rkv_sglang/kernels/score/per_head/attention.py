# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention with a softmax of its own for every query head, in a program that serves one KV head of one request."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.kernels.paged_batch import FP8_DTYPES, VECTOR_BYTES, PagedBuffers
from rkv_sglang.kernels.score.config import NUM_STAGES, ScoreConfig, choose_factor_dtype, key_constants, score_config
from rkv_sglang.kernels.score.device import key_rows, load_tile, window_logits
from rkv_sglang.kernels.score.pool_pass import POINTER_TYPES

# What ``key_constants`` has for kernels that this one is none of.
_OF_OTHERS = ("WITH_REDUNDANCY", "NUM_UNSCORED")
_FRACTIONS = ("softmax_scale", "importance_weight", "decay")


@triton.jit
def attend_per_head(
    key_ptrs,
    key_scales_ptr,
    queries_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    attention_ptr,
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
    LARGEST_STEP: tl.constexpr,
):
    """Write each token's attention, the largest over the query group; over the steps the mean, or the largest too.

    The softmax of each head and step is over the first ``num_scored`` tokens, which get an entry of ``attention_ptr``,
    the request's row of this head. ``log_sums_ptr`` is scratch, ``[num_heads, num_requests, GROUP_SIZE, BLOCK_W]``. The
    grid is (request, layer and head). What is written here may be read after a barrier.
    """
    request = tl.program_id(0)
    layer_head = tl.program_id(1).to(tl.int64)
    layer, kv_head = layer_head // num_kv_heads, layer_head % num_kv_heads
    base = tl.load(key_ptrs + layer).to(tl.pointer_type(ELEMENT)) + kv_head * stride_head
    page_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + request)
    factor = softmax_scale * tl.load(key_scales_ptr + layer)
    query_ptr = queries_ptr + layer * stride_query_layer + request.to(tl.int64) * stride_query_request
    query_ptr += kv_head * GROUP_SIZE * stride_query_head
    log_sums_ptr += (layer_head * tl.num_programs(0) + request) * GROUP_SIZE * BLOCK_W
    steps = tl.arange(0, BLOCK_W)

    for head in range(GROUP_SIZE):
        maxima = tl.full([BLOCK_W], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_W], tl.float32)
        for start in range(0, num_scored, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            inside = tokens < num_scored
            rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
            keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3)
            # [BLOCK_W, BLOCK]; every block has a token, so no maximum stays at -inf.
            logits = window_logits(
                keys,
                rows,
                inside,
                query_ptr + head * stride_query_head,
                stride_query_token,
                stride_query_head,
                factor,
                inside,
                WINDOW,
                1,
                HEAD_DIM,
                BLOCK_W,
                BLOCK_D,
                DOT_WIDTH,
                DOT_DTYPE,
                E4M3,
                QUERY_ALIGNMENT,
                LOGIT_CAP,
            )
            larger = tl.maximum(maxima, tl.max(logits, axis=1))
            sums = sums * tl.exp(maxima - larger) + tl.sum(tl.exp(logits - larger[:, None]), axis=1)
            maxima = larger
        tl.store(log_sums_ptr + head * BLOCK_W + steps, maxima + tl.log(sums))
    tl.debug_barrier()

    for start in range(0, num_scored, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < num_scored
        rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
        keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3)
        largest = tl.zeros([BLOCK_W, BLOCK], tl.float32)
        for head in range(GROUP_SIZE):
            logits = window_logits(
                keys,
                rows,
                inside,
                query_ptr + head * stride_query_head,
                stride_query_token,
                stride_query_head,
                factor,
                inside,
                WINDOW,
                1,
                HEAD_DIM,
                BLOCK_W,
                BLOCK_D,
                DOT_WIDTH,
                DOT_DTYPE,
                E4M3,
                QUERY_ALIGNMENT,
                LOGIT_CAP,
            )
            log_sums = tl.load(log_sums_ptr + head * BLOCK_W + steps)
            attention = tl.exp(logits - log_sums[:, None])
            largest = tl.maximum(largest, attention, propagate_nan=tl.PropagateNan.ALL)
        largest = tl.where((steps < WINDOW)[:, None], largest, 0.0)
        if LARGEST_STEP:
            tl.store(attention_ptr + tokens, tl.max(largest, axis=0), mask=inside)
        else:
            tl.store(attention_ptr + tokens, tl.sum(largest, axis=0) / WINDOW, mask=inside)


@triton.jit
def pool_neighbours(attention_ptr, tokens, reach, num_scored, BLOCK: tl.constexpr):
    """Return the largest attention among the neighbours of ``tokens``, ``[BLOCK]``; -inf where there is none."""
    pooled = tl.full([BLOCK], float("-inf"), tl.float32)
    for offset in range(-reach, reach + 1):
        neighbours = tokens + offset
        exists = (neighbours >= 0) & (neighbours < num_scored)
        attention = tl.load(attention_ptr + neighbours, mask=exists, other=float("-inf"))
        pooled = tl.maximum(pooled, attention, propagate_nan=tl.PropagateNan.ALL)
    return pooled


def query_alignment(queries: Tensor) -> int:
    """Return a power of two, in bytes, that divides the address of each query of any head and step."""
    # The same for every number of requests: their stride divides that of a layer.
    strides = (stride * queries.element_size() for stride in queries.stride()[:4])
    return math.gcd(VECTOR_BYTES, queries.data_ptr(), *strides)


def num_warps(config: ScoreConfig, factor_dtype: torch.dtype, window: int) -> int:
    """Return the warps of a program: 4 have too few registers for factors of fp32, or for a long window."""
    return 8 if factor_dtype == torch.float32 or window > 16 else config.num_warps


def head_constants(
    keys: PagedBuffers,
    query_dtype: torch.dtype,
    query_alignment_bytes: int,
    num_qo_heads: int,
    window: int,
    logit_cap: float,
    config: ScoreConfig,
) -> dict[str, Any]:
    """Return the compile-time arguments of a kernel that calls ``attend_per_head``."""
    return _constants(
        storage_dtype=keys.storage_dtype,
        dtype=keys.dtype,
        factor_dtype=choose_factor_dtype(keys.dtype, query_dtype),
        page_size=keys.page_size,
        alignment_bytes=keys.alignment_bytes,
        query_alignment_bytes=query_alignment_bytes,
        window=window,
        gqa_group_size=num_qo_heads // keys.num_kv_heads,
        head_dim=keys.head_dim,
        config=config,
        logit_cap=logit_cap,
    )


def _constants(**sizes: Any) -> dict[str, Any]:
    constants = key_constants(**sizes, with_redundancy=False)
    return {name: value for name, value in constants.items() if name not in _OF_OTHERS}


_SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "e4m3"}


def head_case(
    kernel: Any, dtype: torch.dtype, query_dtype: torch.dtype, head_dim: int, *, window: int
) -> tuple[str, Any, dict[str, str], dict[str, Any], int, int]:
    """Return the case of a kernel that calls ``attend_per_head``, for a list of ``AOT_CASES``."""
    factor_dtype = choose_factor_dtype(dtype, query_dtype)
    config = score_config(head_dim, dtype, factor_dtype)
    constants = _constants(
        storage_dtype=torch.uint8 if dtype in FP8_DTYPES else dtype,
        dtype=dtype,
        factor_dtype=factor_dtype,
        page_size=1,
        alignment_bytes=16,
        query_alignment_bytes=16,
        window=window,
        gqa_group_size=4,
        head_dim=head_dim,
        config=config,
    )
    types = POINTER_TYPES | {"queries_ptr": f"*{_SHORT[query_dtype]}"} | dict.fromkeys(_FRACTIONS, "fp32")
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name.islower()
    }
    name = f"{kernel.__name__.removesuffix('_kernel')}_{_SHORT[dtype]}_by_{_SHORT[query_dtype]}_d{head_dim}_w{window}"
    return (name, kernel, signature, constants, num_warps(config, factor_dtype, window), NUM_STAGES)
