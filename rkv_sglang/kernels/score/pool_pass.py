"""Compile-time arguments of the kernels that read one side of the pool and no queries."""

from typing import Any

import torch

from rkv_sglang.kernels.paged_batch import FP8_DTYPES, PagedBuffers
from rkv_sglang.kernels.score.config import ELEMENTS, padded_head_dim


def tokens_per_program(head_dim: int, dtype: torch.dtype) -> int:
    """Return how many tokens of a side one program reads: what leaves it room in its registers."""
    return 32 if head_dim > 128 and dtype == torch.float32 else 64


def pass_constants(buffers: PagedBuffers, block: int, *, window: int | None = None) -> dict[str, Any]:
    """Return the compile-time arguments of a kernel that reads one side of the pool and no queries."""
    constants = {
        "ELEMENT": ELEMENTS[buffers.storage_dtype],
        "E4M3": buffers.dtype == torch.float8_e4m3fn,
        "PAGE_SIZE": buffers.page_size,
        "ALIGNMENT": buffers.alignment_bytes,
        "HEAD_DIM": buffers.head_dim,
        "BLOCK": block,
        "BLOCK_D": padded_head_dim(buffers.head_dim),
    }
    return constants if window is None else constants | {"WINDOW": window}


def aot_constants(dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """Return what ``pass_constants`` returns for a pool of slots of that dtype, aligned as SGLang's."""
    return {
        "ELEMENT": ELEMENTS[torch.uint8 if dtype in FP8_DTYPES else dtype],
        "E4M3": dtype == torch.float8_e4m3fn,
        "PAGE_SIZE": 1,
        "ALIGNMENT": 16,
        "HEAD_DIM": head_dim,
        "BLOCK": tokens_per_program(head_dim, dtype),
        "BLOCK_D": padded_head_dim(head_dim),
    }


POINTER_TYPES = {"key_ptrs": "*i64", "kv_indptr_ptr": "*i32", "kv_indices_ptr": "*i64", "token_indptr_ptr": "*i64"}


def pass_signature(kernel: Any) -> dict[str, str]:
    """Return the types of a kernel's runtime arguments."""
    return {
        name: POINTER_TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name.islower()
    }
