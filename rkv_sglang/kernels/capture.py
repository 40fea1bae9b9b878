# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Keep the queries of one decode step for the requests that come due soon; runs inside decode CUDA graphs."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

# A launch is what capturing costs, so one serves several layers. Their queries live until then, which the next layers
# could otherwise overwrite: one launch for all layers would hold the queries of all.
LAYERS_PER_LAUNCH = 8
# Elements of a query row that one program copies: 16 bytes for each of its threads.
BLOCK = 1024
NUM_WARPS = 4
NUM_STAGES = 1


@triton.jit(do_not_specialize_on_alignment=["row_of_request_ptr", "req_pool_indices_ptr", "positions_ptr"])
def _capture_queries_kernel(
    rings_ptr,
    row_of_request_ptr,
    layer_queries,
    req_pool_indices_ptr,
    positions_ptr,
    rows_per_layer,
    stride_queries_row,
    WINDOW: tl.constexpr,
    ROW_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy ``BLOCK`` numbers of one request's queries of one layer into its ring; nothing for a request with row 0."""
    step = tl.program_id(0)
    row = tl.load(row_of_request_ptr + tl.load(req_pool_indices_ptr + step))
    # Most requests have no row, nor have the rows that pad a graph's batch: their programs end here.
    if row != 0:
        offset = tl.load(positions_ptr + step) % WINDOW
        elements = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = elements < ROW_LEN
        source_row = step.to(tl.int64) * stride_queries_row
        target_row = (tl.program_id(2).to(tl.int64) * rows_per_layer + row) * WINDOW + offset
        target = rings_ptr + target_row * ROW_LEN
        # A program copies one layer: only which pointer it takes is found out while it runs.
        for layer in tl.static_range(len(layer_queries)):
            if tl.program_id(2) == layer:
                queries = tl.load(layer_queries[layer] + source_row + elements, mask=inside)
                tl.store(target + elements, queries.to(rings_ptr.dtype.element_ty), mask=inside)


def capture_queries(
    rings: torch.Tensor,
    row_of_request: torch.Tensor,
    layer_queries: Sequence[torch.Tensor],
    req_pool_indices: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write each request's queries of some layers into its row of their rings, at ``position % window``. One launch.

    Mutates ``rings``; allocates nothing and queues no sync, and its grid depends on the batch size alone, so a CUDA
    graph can hold it. A request with row 0 writes nothing.

    Args:
        rings: Rings, ``[num_layers, num_rows + 1, window, num_qo_heads, head_dim]``, floating, contiguous.
        row_of_request: Row of each ``req_to_token`` row, ``[max_requests]``, int64, contiguous; 0 for none.
        layer_queries: Of each layer after RoPE, ``[bs, num_qo_heads * head_dim]``, floating, of any row stride, alike
            in all layers; cast to the rings' dtype.
        req_pool_indices: ``[bs]``, int32 or int64, contiguous, each in ``[0, max_requests)``.
        positions: Logical positions, ``[bs]``, int32 or int64, contiguous, not negative.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.
    """
    _check(rings, row_of_request, layer_queries, req_pool_indices, positions)
    window, num_qo_heads, head_dim = rings.shape[2:]
    row_len = num_qo_heads * head_dim
    batch_size = len(req_pool_indices)
    if batch_size == 0:
        return
    _capture_queries_kernel[(batch_size, triton.cdiv(row_len, BLOCK), len(rings))](
        rings,
        row_of_request,
        tuple(layer_queries),
        req_pool_indices,
        positions,
        rings.shape[1],
        layer_queries[0].stride(0),
        WINDOW=window,
        ROW_LEN=row_len,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


def capture_queries_torch(
    rings: torch.Tensor,
    row_of_request: torch.Tensor,
    layer_queries: Sequence[torch.Tensor],
    req_pool_indices: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Do what ``capture_queries`` does, in plain torch, but write the queries of requests without a row to row 0."""
    rows, offsets = row_of_request[req_pool_indices], positions % rings.shape[2]
    for ring, queries in zip(rings, layer_queries, strict=True):
        ring[rows, offsets] = queries.view(-1, *ring.shape[2:]).to(ring.dtype)


def _check(
    rings: torch.Tensor,
    row_of_request: torch.Tensor,
    layer_queries: Sequence[torch.Tensor],
    req_pool_indices: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    if rings.dim() != 5 or not rings.is_floating_point() or not rings.is_contiguous():
        raise ValueError(
            "rings must be a floating, contiguous [num_layers, num_rows + 1, window, num_qo_heads, head_dim], "
            f"got {rings.dtype} {list(rings.shape)} with strides {list(rings.stride())}"
        )
    if len(layer_queries) != len(rings):
        raise ValueError(f"rings have {len(rings)} layers and layer_queries {len(layer_queries)}: they must be equal")
    row_len = rings.shape[3] * rings.shape[4]
    first = layer_queries[0]
    for queries in layer_queries:
        if queries.dim() != 2 or queries.shape[1] != row_len or not queries.is_floating_point():
            raise ValueError(f"queries must be floating [bs, {row_len}], got {queries.dtype} {list(queries.shape)}")
        if queries.stride(1) != 1:
            raise ValueError(f"queries must have a last stride of 1, got strides {list(queries.stride())}")
        if (queries.dtype, queries.shape, queries.stride()) != (first.dtype, first.shape, first.stride()):
            raise ValueError(
                f"queries must be alike in all layers, got {first.dtype} {list(first.shape)} strided "
                f"{list(first.stride())} and {queries.dtype} {list(queries.shape)} strided {list(queries.stride())}"
            )
    if row_of_request.dim() != 1 or row_of_request.dtype != torch.int64 or not row_of_request.is_contiguous():
        raise ValueError(
            f"row_of_request must be a contiguous int64 [max_requests], got {row_of_request.dtype} "
            f"{list(row_of_request.shape)}"
        )
    for name, tensor in (("req_pool_indices", req_pool_indices), ("positions", positions)):
        integral = tensor.dtype in (torch.int32, torch.int64)
        if tensor.shape != first.shape[:1] or not integral or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous int32 or int64 [{first.shape[0]}], got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    for name, tensor in (
        ("row_of_request", row_of_request),
        *(("queries", queries) for queries in layer_queries),
        ("req_pool_indices", req_pool_indices),
        ("positions", positions),
    ):
        if tensor.device != rings.device:
            raise ValueError(f"{name} is on {tensor.device} and rings on {rings.device}: put all on one device")


# (name, kernel, signature, constexprs, num_warps, num_stages) of what is shipped; a tuple of types is one of tensors.
AOT_CASES: list[tuple[str, Any, dict[str, Any], dict[str, Any], int, int]] = [
    (
        f"capture_{queries_dtype}_to_{rings_dtype}_{row_len}",
        _capture_queries_kernel,
        {
            "rings_ptr": f"*{rings_dtype}",
            "row_of_request_ptr": "*i64",
            "layer_queries": (f"*{queries_dtype}",) * LAYERS_PER_LAUNCH,
            "req_pool_indices_ptr": "*i64",
            "positions_ptr": "*i64",
            "rows_per_layer": "i32",
            "stride_queries_row": "i32",
        },
        {"WINDOW": 8, "ROW_LEN": row_len, "BLOCK": BLOCK},
        NUM_WARPS,
        NUM_STAGES,
    )
    for queries_dtype, rings_dtype, row_len in (
        ("bf16", "bf16", 32 * 128),
        ("bf16", "bf16", 9 * 64),
        ("fp16", "fp16", 32 * 128),
        ("fp32", "fp32", 32 * 128),
        ("fp32", "bf16", 32 * 128),
    )
]
