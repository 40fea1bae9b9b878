"""Sizes and types of the score's programs, chosen by head_dim and dtype alone, and the list of what is shipped."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from rkv_sglang.kernels.paged_batch import FP8_DTYPES
from rkv_sglang.kernels.score.combine import combine_scores_kernel
from rkv_sglang.kernels.score.key_passes import score_request_kernel

MAX_WINDOW = 64
# Of the kernels that read no keys.
NUM_WARPS = 4
NUM_STAGES = 2
# Tokens of one program that combines the parts of the score.
COMBINE_BLOCK = 256
# Block results read at a time by the kernels of ``mean_keys``.
CHUNK = 32
# Rows of queries, those of several heads, that are multiplied with keys at once.
MOST_QUERY_ROWS = 32
ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.uint8: tl.uint8}


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Sizes of a program that reads keys.

    Attributes:
        block: Keys that it reads at a time, and compares with as many, a power of two from 16.
        dot_width: Dimensions that it multiplies at a time, a power of two from 16; None for all.
        num_warps: Warps.
        num_stages: Tiles of keys that are read ahead of their use, and the one that is used.
    """

    block: int
    dot_width: int | None = None
    num_warps: int = 4
    num_stages: int = 2


def score_config(head_dim: int, factor_dtype: torch.dtype) -> ScoreConfig:
    """Return the sizes that keep both tiles of keys and their products in registers and shared memory.

    Args:
        head_dim: Of the keys.
        factor_dtype: Type of the factors of the products.
    """
    if factor_dtype == torch.float32:
        return ScoreConfig(block=32, dot_width=32)
    if head_dim > 128:
        return ScoreConfig(block=32, num_warps=8)
    return ScoreConfig(block=64, num_warps=4 if head_dim <= 64 else 8)


def choose_factor_dtype(key_dtype: torch.dtype, query_dtype: torch.dtype) -> torch.dtype:
    """Return the type of the factors in which both dtypes are exact; products are summed in fp32."""
    # The interpreter multiplies the bit patterns of bf16 numbers. fp32 gives the same products.
    if triton.knobs.runtime.interpret:
        return torch.float32
    if query_dtype in (torch.bfloat16, torch.float16) and key_dtype in (query_dtype, *FP8_DTYPES):
        return query_dtype
    return torch.float32


def key_constants(
    *,
    storage_dtype: torch.dtype,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    page_size: int,
    alignment_bytes: int,
    query_alignment_bytes: int,
    window: int,
    gqa_group_size: int,
    head_dim: int,
    config: ScoreConfig,
    with_redundancy: bool,
    num_unscored: int | None = None,
) -> dict[str, Any]:
    """Return the compile-time arguments that both passes over the keys share; by default the window is unscored."""
    return {
        "ELEMENT": ELEMENTS[storage_dtype],
        "E4M3": dtype == torch.float8_e4m3fn,
        "DOT_DTYPE": ELEMENTS[factor_dtype],
        "PAGE_SIZE": page_size,
        "ALIGNMENT": alignment_bytes,
        "QUERY_ALIGNMENT": query_alignment_bytes,
        "WINDOW": window,
        "GROUP_SIZE": gqa_group_size,
        "HEAD_DIM": head_dim,
        "BLOCK": config.block,
        "BLOCK_W": padded_window(window),
        "HEADS": heads_at_once(window, gqa_group_size),
        "BLOCK_D": padded_head_dim(head_dim),
        "DOT_WIDTH": config.dot_width or padded_head_dim(head_dim),
        "WITH_REDUNDANCY": with_redundancy,
        "NUM_UNSCORED": window if num_unscored is None else num_unscored,
    }


def padded_window(window: int) -> int:
    """Return the rows of a tile of one head's window queries: a power of two."""
    return int(triton.next_power_of_2(window))


def heads_at_once(window: int, gqa_group_size: int) -> int:
    """Return how many heads of a query group are multiplied at once, a power of two: matrix units want 16 rows."""
    rows = padded_window(window)
    wanted = int(triton.next_power_of_2(gqa_group_size))
    return max(16 // rows, min(wanted, max(1, MOST_QUERY_ROWS // rows)))


def padded_head_dim(head_dim: int) -> int:
    """Return the columns of a tile of keys."""
    return max(16, int(triton.next_power_of_2(head_dim)))


_Case = tuple[str, Any, dict[str, str], dict[str, Any], int, int]
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_SHORT |= {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def _signature(kernel: Any, query_type: str, with_redundancy: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the types of a kernel's runtime arguments, and the tensors that it is called without."""
    types = {
        "key_ptrs": "*i64",
        "queries_ptr": f"*{query_type}",
        "kv_indptr_ptr": "*i32",
        "kv_indices_ptr": "*i64",
        "token_indptr_ptr": "*i64",
        "waiting_ptr": "*i32",
    }
    fractions = ("softmax_scale", "threshold", "importance_weight", "redundancy_weight")
    unused = {"exp_sums_ptr", "factors_ptr", "exempt_ptr", "waiting_ptr", "column_means_ptr"}
    signature: dict[str, str] = {}
    absent: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in unused and not with_redundancy:
            absent[name] = None
        elif name in types:
            signature[name] = types[name]
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        elif name in fractions:
            signature[name] = "fp32"
        elif name.islower():
            signature[name] = "i32"
    return signature, absent


def _key_case(dtype: torch.dtype, query_dtype: torch.dtype, head_dim: int, **sizes: Any) -> _Case:
    """Return the case of the kernel that reads keys."""
    factor_dtype = choose_factor_dtype(dtype, query_dtype)
    config = score_config(head_dim, factor_dtype)
    with_redundancy = sizes.pop("with_redundancy", True)
    sizes = {"page_size": 1, "window": 8, "gqa_group_size": 4} | sizes
    constants = key_constants(
        storage_dtype=torch.uint8 if dtype in FP8_DTYPES else dtype,
        dtype=dtype,
        factor_dtype=factor_dtype,
        alignment_bytes=16,
        query_alignment_bytes=16,
        head_dim=head_dim,
        config=config,
        with_redundancy=with_redundancy,
        **sizes,
    )
    suffix = f"{_SHORT[dtype]}_by_{_SHORT[query_dtype]}_d{head_dim}" + "".join(f"_{k[0]}{v}" for k, v in sizes.items())
    signature, absent = _signature(score_request_kernel, _SHORT[query_dtype], with_redundancy)
    name = f"{'' if with_redundancy else 'importance_'}score_request_{suffix}"
    return name, score_request_kernel, signature, constants | absent, config.num_warps, config.num_stages


def _combine_case(window: int, with_redundancy: bool) -> _Case:
    """Return the case of the kernel that reads none."""
    constants = {"WINDOW": window, "BLOCK": COMBINE_BLOCK, "WITH_REDUNDANCY": with_redundancy}
    signature, absent = _signature(combine_scores_kernel, "bf16", with_redundancy)
    name = f"combine_scores_w{window}_{with_redundancy}"
    return name, combine_scores_kernel, signature, constants | absent, NUM_WARPS, NUM_STAGES


# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[_Case] = [
    *(_key_case(torch.bfloat16, torch.bfloat16, head_dim) for head_dim in (64, 80, 96, 128, 256)),
    *(_key_case(torch.float16, torch.float16, head_dim) for head_dim in (128, 256)),
    *(_key_case(torch.float32, torch.float32, head_dim) for head_dim in (128, 256)),
    *(_key_case(torch.float8_e4m3fn, torch.bfloat16, head_dim) for head_dim in (128, 256)),
    _key_case(torch.float8_e5m2, torch.bfloat16, 128),
    _key_case(torch.bfloat16, torch.float32, 128),
    _key_case(torch.bfloat16, torch.bfloat16, 128, page_size=16),
    _key_case(torch.bfloat16, torch.bfloat16, 128, gqa_group_size=16),
    _key_case(torch.bfloat16, torch.bfloat16, 128, window=MAX_WINDOW),
    _key_case(torch.bfloat16, torch.bfloat16, 256, window=MAX_WINDOW),
    _key_case(torch.bfloat16, torch.bfloat16, 128, with_redundancy=False),
    *(_combine_case(window, True) for window in (8, MAX_WINDOW)),
    _combine_case(8, False),
]
