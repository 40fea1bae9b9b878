# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Points of each head that lie far apart, chosen one after the other; ``informed.beaconkv.farthest`` is the oracle."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.kernels.transfer import to_device

# Numbers of a point that are multiplied at a time.
WIDTH = 16


@triton.jit(do_not_specialize=("num_points", "num_dims"), do_not_specialize_on_alignment=("num_known_ptr",))
def choose_farthest_kernel(
    points_ptr,
    num_known_ptr,
    chosen_ptr,
    num_kv_heads,
    num_points,
    num_dims,
    COUNT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Choose up to ``COUNT`` points of one head of one request that lie far apart, ascending; then repeat the first.

    ``points`` are ``[num_layers, num_requests, num_kv_heads, num_points, num_dims]``, fp32, of which each request has
    ``num_known``; ``chosen`` is ``[num_layers, num_requests, num_kv_heads, COUNT]``.
    """
    request = tl.program_id(0)
    layer_head = tl.program_id(1).to(tl.int64)
    layer, head = layer_head // num_kv_heads, layer_head % num_kv_heads
    row = (layer * tl.num_programs(0) + request) * num_kv_heads + head
    num_known = tl.load(num_known_ptr + request).to(tl.int32)
    points = tl.arange(0, BLOCK_P)
    known = points < num_known
    point_rows = points_ptr + (row * num_points + points) * num_dims

    # The mean is subtracted first: points that have much in common differ in small numbers.
    products = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
    for start in range(0, num_dims, WIDTH):
        dims = start + tl.arange(0, WIDTH)
        mask = known[:, None] & (dims < num_dims)[None, :]
        part = tl.load(point_rows[:, None] + dims[None, :], mask=mask, other=0.0)
        mean = tl.sum(part, axis=0) / num_known
        part = tl.where(mask, part - mean[None, :], 0.0)
        products = tl.dot(part, tl.trans(part), products, input_precision="ieee")
    diagonal = points[:, None] == points[None, :]
    lengths = tl.sum(tl.where(diagonal, products, 0.0), axis=1)

    nearest = lengths
    chosen = tl.zeros([BLOCK_P], tl.int32)
    for step in range(tl.minimum(COUNT, num_known)):
        best = tl.argmax(tl.where(known & (chosen == 0), nearest, float("-inf")), axis=0)
        is_best = points == best
        chosen = tl.where(is_best, 1, chosen)
        to_best = tl.sum(tl.where(is_best[:, None], products, 0.0), axis=0)
        to_best = lengths + tl.sum(tl.where(is_best, lengths, 0.0), axis=0) - 2.0 * to_best
        nearest = tl.where(step == 0, to_best, tl.minimum(nearest, to_best))
    first = tl.min(tl.where(chosen == 1, points, BLOCK_P), axis=0)
    places = tl.arange(0, BLOCK_C)
    tl.store(chosen_ptr + row * COUNT + places, first, mask=(places < COUNT) & (places >= num_known))
    ranks = tl.cumsum(chosen, axis=0) - 1
    tl.store(chosen_ptr + row * COUNT + ranks, points, mask=chosen == 1)


def choose_farthest(points: Tensor, num_known: Sequence[int], count: int, most_new: int) -> Tensor:
    """Choose up to ``count`` points of each head of each request that lie far apart. One launch, no sync.

    Args:
        points: ``[num_layers, num_requests, num_kv_heads, num_points, num_dims]``, fp32, contiguous.
        num_known: How many of them each request has, at most ``count + most_new``.
        most_new: By how many there may be more than ``count``.

    Returns:
        Indices, ascending, then the first again if there are fewer,
        ``[num_layers, num_requests, num_kv_heads, count]``, int64.
    """
    num_layers, num_requests, num_kv_heads, num_points, num_dims = points.shape
    chosen = torch.empty((num_layers, num_requests, num_kv_heads, count), dtype=torch.int64, device=points.device)
    # As many as there may ever be: one kernel for all.
    block_p = _padded(count + most_new)
    choose_farthest_kernel[(num_requests, num_layers * num_kv_heads)](
        *(points, to_device(num_known, torch.int64, points.device), chosen, num_kv_heads, num_points, num_dims),
        COUNT=count,
        BLOCK_P=block_p,
        BLOCK_C=_padded(count),
        WIDTH=WIDTH,
        num_warps=_num_warps(block_p),
        num_stages=1,
    )
    return chosen


def _padded(count: int) -> int:
    return max(16, int(triton.next_power_of_2(count)))


def _num_warps(block_p: int) -> int:
    """Return the warps that hold the products of so many points in their registers."""
    return 8 if block_p <= 64 else 16


_TYPES = {"points_ptr": "*fp32", "num_known_ptr": "*i64", "chosen_ptr": "*i64"}
# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
    (
        f"choose_farthest_{count}_{block}",
        choose_farthest_kernel,
        {name: _TYPES.get(name, "i32") for name in choose_farthest_kernel.arg_names if name.islower()},
        {"COUNT": count, "BLOCK_P": block, "BLOCK_C": _padded(count), "WIDTH": WIDTH},
        _num_warps(block),
        1,
    )
    for count, block in ((28, 64), (60, 128))
]
