"""A stand-in for ``sgl_kernel`` on machines without a GPU. It is NOT the real package.

SGLang 0.5.23 publishes its kernels for CUDA only, yet imports a few names of them on a CPU too. Two are used and
implemented here in torch and ctypes; the others belong to speculative decoding, are imported and never called, and
raise ``NotImplementedError`` if they ever are. Nothing of ``rkv_sglang`` depends on this package.
"""

import ctypes
from collections.abc import Callable

import torch

IS_CPU_STANDIN = True


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new slots into ``req_to_token[row, start:end]``, in batch order."""
    offset = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in rows:
        req_to_token[row, start:end] = out_cache_loc[offset : offset + end - start].to(req_to_token.dtype)
        offset += end - start


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy row ``src_loc[i]`` to ``tgt_loc[i]`` in every buffer; ``strides`` are row sizes in bytes."""
    targets, sources = tgt_loc.tolist(), src_loc.tolist()
    for base, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(base + source * stride, stride) for source in sources]
        for target, row in zip(targets, rows, strict=True):
            ctypes.memmove(base + target * stride, row, stride)


def __getattr__(name: str) -> Callable[..., None]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"the CPU stand-in of sgl_kernel has no {name!r}")

    def never_called(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"{name} is not in the CPU stand-in of sgl_kernel: install SGLang on a GPU machine")

    return never_called
