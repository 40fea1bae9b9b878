"""Checks of what the scoring kernels are given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.config import MAX_WINDOW


def check_pool(name: str, buffers: PagedBuffers, batch: PagedBatch) -> None:
    """Raise ``ValueError`` unless the pages of ``batch`` are pages of ``buffers``."""
    if buffers.page_size != batch.page_size:
        raise ValueError(f"{name} have page_size {buffers.page_size} and batch {batch.page_size}: they must be equal")
    if buffers.device != batch.device:
        raise ValueError(f"batch is on {batch.device} and {name} on {buffers.device}: put all on one device")


def check_score_inputs(keys: PagedBuffers, batch: PagedBatch, queries: Tensor) -> None:
    """Raise ``ValueError`` unless the three fit together and are within what the kernels support."""
    check_pool("keys", keys, batch)
    if not 1 <= batch.window <= MAX_WINDOW:
        raise ValueError(f"batch has a window of {batch.window}: at most {MAX_WINDOW} is supported")
    wanted = [keys.num_layers, batch.num_requests, batch.window, keys.head_dim]
    if queries.dim() != 5 or [*queries.shape[:3], queries.shape[4]] != wanted:
        raise ValueError(
            f"queries must be [num_layers {wanted[0]}, num_requests {wanted[1]}, window {wanted[2]}, num_qo_heads, "
            f"head_dim {wanted[3]}], got {list(queries.shape)}"
        )
    if queries.shape[3] == 0 or queries.shape[3] % keys.num_kv_heads:
        raise ValueError(
            f"num_qo_heads {queries.shape[3]} of queries must be a multiple of num_kv_heads {keys.num_kv_heads}"
        )
    if queries.dtype not in (torch.bfloat16, torch.float16, torch.float32) or queries.stride(4) != 1:
        raise ValueError(
            f"queries must be bf16, fp16 or fp32 with stride 1 along head_dim, "
            f"got {queries.dtype} with strides {list(queries.stride())}"
        )
    if queries.device != keys.device:
        raise ValueError(f"queries is on {queries.device} and keys on {keys.device}: put all on one device")


def check_prompt_hits(prompt_hits: Sequence[PromptHits | None], keys: PagedBuffers, batch: PagedBatch) -> None:
    """Raise ``ValueError`` unless there is an entry for each request, and of its own prompt."""
    if len(prompt_hits) != batch.num_requests:
        raise ValueError(f"prompt_hits must have {batch.num_requests} entries, got {len(prompt_hits)}")
    for request, (own, prompt_len) in enumerate(zip(prompt_hits, batch.prompt_lens_cpu, strict=True)):
        if own is None:
            continue
        wanted, columns = [keys.num_layers, keys.num_kv_heads, prompt_len], own.columns
        fits = columns.dtype == torch.int32 and columns.device == keys.device and columns.is_contiguous()
        if list(columns.shape) != wanted or not fits:
            raise ValueError(
                f"prompt_hits of request {request} must be contiguous int32 {wanted} on {keys.device}, got "
                f"{columns.dtype} {list(columns.shape)} on {columns.device}"
            )
