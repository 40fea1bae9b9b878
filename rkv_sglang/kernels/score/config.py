"""Sizes and types of the score's programs, chosen by head_dim and dtype alone, and the list of what is shipped."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from rkv_sglang.kernels.paged_batch import FP8_DTYPES
from rkv_sglang.kernels.score.key_passes import score_tokens_kernel, summarise_blocks_kernel
from rkv_sglang.kernels.score.scan import scan_rows_kernel
from rkv_sglang.kernels.score.totals import combine_scores_kernel, reduce_blocks_kernel

MAX_WINDOW = 64
# Of the kernels that read keys of up to 128 numbers of 16 bits. On an H200, head_dim 128: 0.70 of the time of 8.
KEY_WARPS = 4
# Of the kernels that read no keys.
NUM_WARPS = 4
NUM_STAGES = 2
# Dimensions at a time of single similarities that are computed again: whole rows would need too many registers.
KNOWN_WIDTH = 16
# Tokens of one program that combines the parts of the score, and block results read at a time.
COMBINE_BLOCK = 256
CHUNK = 32
ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.uint8: tl.uint8}
# On an H200 9 to 12 % faster than 64 wherever near-duplicates exist, and never slower.
FIRST_COLUMNS = 32


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Sizes of a program that reads keys.

    Attributes:
        block: Keys that it owns, a power of two from 16.
        block_columns: Keys that it compares them with at a time, a power of two from 16.
        dot_width: Dimensions that it multiplies at a time, a power of two from 16; None for all.
        num_warps: Warps.
        first_columns: Newest keys that every key is compared with before rows are listed, a power of two from 16; None
            for ``block_columns``.
    """

    block: int
    block_columns: int
    dot_width: int | None = None
    num_warps: int = 4
    first_columns: int | None = None


def score_config(head_dim: int, key_dtype: torch.dtype, factor_dtype: torch.dtype) -> ScoreConfig:
    """Return the sizes that keep both tiles of keys and their products in registers and shared memory.

    Args:
        head_dim: Of the keys.
        key_dtype: Of the keys.
        factor_dtype: Type of the factors of the products.
    """
    if factor_dtype == torch.float32:
        return ScoreConfig(block=32, block_columns=32, dot_width=32)
    if head_dim > 128:
        return ScoreConfig(block=32, block_columns=32, num_warps=8)
    # fp8 is decoded in registers, of which 4 warps then have too few on sm_80.
    num_warps = 8 if head_dim > 64 and key_dtype in FP8_DTYPES else KEY_WARPS
    return ScoreConfig(block=64, block_columns=64, num_warps=num_warps, first_columns=FIRST_COLUMNS)


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
    logit_cap: float = 0.0,
) -> dict[str, Any]:
    """Return the compile-time arguments that both passes over the keys share; by default the window is unscored."""
    return {
        "ELEMENT": ELEMENTS[storage_dtype],
        "E4M3": dtype == torch.float8_e4m3fn,
        "DOT_DTYPE": ELEMENTS[factor_dtype],
        "PAGE_SIZE": page_size,
        "ALIGNMENT": alignment_bytes,
        # The widest loads of fp32 queries leave too few registers: the programs of head_dim 128 and 256 would spill.
        "QUERY_ALIGNMENT": min(query_alignment_bytes, 8 if factor_dtype == torch.float32 else 16),
        "WINDOW": window,
        "GROUP_SIZE": gqa_group_size,
        "HEAD_DIM": head_dim,
        "BLOCK": config.block,
        "BLOCK_W": padded_window(window),
        "BLOCK_D": padded_head_dim(head_dim),
        "DOT_WIDTH": config.dot_width or padded_head_dim(head_dim),
        "WITH_REDUNDANCY": with_redundancy,
        "NUM_UNSCORED": window if num_unscored is None else num_unscored,
        "LOGIT_CAP": logit_cap,
    }


def scan_constants(constants: dict[str, Any], config: ScoreConfig) -> dict[str, Any]:
    """Return the compile-time arguments of the scan, given ``key_constants``."""
    shared = {name: value for name, value in constants.items() if name in scan_rows_kernel.arg_names}
    own = {"BLOCK_COLUMNS": config.block_columns, "FIRST_COLUMNS": config.first_columns or config.block_columns}
    return shared | own | {"KNOWN_WIDTH": KNOWN_WIDTH}


def padded_window(window: int) -> int:
    """Return the rows of a tile of window queries: a power of two from 16, as matrix units want."""
    return max(16, int(triton.next_power_of_2(window)))


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
        "prompt_lens_ptr": "*i32",
        "hits_ptrs": "*i64",
        "left_ptr": "*i32",
        "newest_ptr": "*i32",
        "counts_ptr": "*i64",
        "exempt_ptr": "*i64",
    }
    fractions = ("softmax_scale", "threshold", "importance_weight", "redundancy_weight")
    unused = {"key_sums_ptr", "key_totals_ptr", "exp_sums_ptr", "exempt_ptr", "column_means_ptr"}
    unused |= {"factors_ptr", "left_ptr", "newest_ptr", "counts_ptr"}
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


def _key_cases(dtype: torch.dtype, query_dtype: torch.dtype, head_dim: int, **sizes: Any) -> list[_Case]:
    """Return the cases of both passes over the keys, and of the scan between them."""
    factor_dtype = choose_factor_dtype(dtype, query_dtype)
    config = score_config(head_dim, dtype, factor_dtype)
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
    first = {"FIRST_COLUMNS": config.first_columns or config.block_columns}
    kernels: list[tuple[Any, dict[str, Any]]] = [(summarise_blocks_kernel, constants | first)]
    kernels.append((score_tokens_kernel, constants))
    # The scan reads no queries.
    if with_redundancy and (sizes["window"], sizes["gqa_group_size"]) == (8, 4):
        kernels.append((scan_rows_kernel, scan_constants(constants, config)))
    cases: list[_Case] = []
    for kernel, own in kernels:
        signature, absent = _signature(kernel, _SHORT[query_dtype], with_redundancy)
        name = f"{'' if with_redundancy else 'importance_'}{kernel.__name__.removesuffix('_kernel')}_{suffix}"
        cases.append((name, kernel, signature, own | absent, config.num_warps, NUM_STAGES))
    return cases


def _total_cases(head_dim: int, window: int, with_redundancy: bool) -> list[_Case]:
    """Return the cases of both passes that read no keys."""
    config = score_config(head_dim, torch.bfloat16, torch.bfloat16)
    reduce_constants = {"BLOCK": config.block, "CHUNK": CHUNK, "WITH_REDUNDANCY": with_redundancy}
    reduce_constants |= {"BLOCK_W": padded_window(window), "BLOCK_D": padded_head_dim(head_dim)}
    combine_constants = {"WINDOW": window, "KEY_BLOCK": config.block, "BLOCK": COMBINE_BLOCK, "CHUNK": CHUNK}
    combine_constants |= {"WITH_REDUNDANCY": with_redundancy}
    cases: list[_Case] = []
    for kernel, constants in ((reduce_blocks_kernel, reduce_constants), (combine_scores_kernel, combine_constants)):
        signature, absent = _signature(kernel, "bf16", with_redundancy)
        name = f"{kernel.__name__.removesuffix('_kernel')}_d{head_dim}_w{window}_{with_redundancy}"
        cases.append((name, kernel, signature, constants | absent, NUM_WARPS, NUM_STAGES))
    return cases


# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[_Case] = [
    case
    for cases in (
        *(_key_cases(torch.bfloat16, torch.bfloat16, head_dim) for head_dim in (64, 80, 96, 128, 256)),
        *(_key_cases(torch.float16, torch.float16, head_dim) for head_dim in (128, 256)),
        *(_key_cases(torch.float32, torch.float32, head_dim) for head_dim in (128, 256)),
        *(_key_cases(torch.float8_e4m3fn, torch.bfloat16, head_dim) for head_dim in (128, 256)),
        _key_cases(torch.float8_e5m2, torch.bfloat16, 128),
        _key_cases(torch.bfloat16, torch.float32, 128),
        _key_cases(torch.bfloat16, torch.bfloat16, 128, page_size=16),
        _key_cases(torch.bfloat16, torch.bfloat16, 128, gqa_group_size=16),
        _key_cases(torch.bfloat16, torch.bfloat16, 128, window=MAX_WINDOW),
        _key_cases(torch.bfloat16, torch.bfloat16, 256, window=MAX_WINDOW),
        _key_cases(torch.bfloat16, torch.bfloat16, 128, with_redundancy=False),
        _key_cases(torch.bfloat16, torch.bfloat16, 128, logit_cap=30.0),
        *(_total_cases(head_dim, window, True) for head_dim, window in ((64, 8), (128, 8), (256, MAX_WINDOW))),
        _total_cases(128, 8, False),
    )
    for case in cases
]
