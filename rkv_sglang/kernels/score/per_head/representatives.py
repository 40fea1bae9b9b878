# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Keys that stand for a segment, by a k-means of real keys; ``algorithm.centroids`` is the oracle.

One launch: a program serves one segment of one request in one layer and KV head. Distances are sums of squared
differences, never differences of squares, so near keys are told apart.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.algorithm.centroids import SAME_DISTANCE
from rkv_sglang.algorithm.thoughts import AIM, HELD, sizes_of_levels
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.checks import check_pool
from rkv_sglang.kernels.score.device import BATCH_POINTERS, VARYING_SIZES, key_rows, load_tile
from rkv_sglang.kernels.score.places import places_of, spread
from rkv_sglang.kernels.score.pool_pass import POINTER_TYPES, aot_constants, pass_constants
from rkv_sglang.kernels.transfer import to_device
from rkv_sglang.policies.base import CHOSEN

SAME = tl.constexpr(1.0 + SAME_DISTANCE)
CHOSEN_SCORE = tl.constexpr(CHOSEN)
# Dimensions that are read at a time for the distance to one key, and to all centroids: more of these takes too many
# registers, and fewer too much of the interpreter's time.
WIDTH = 16
CENTROID_WIDTH, INTERPRETED_WIDTH = 1, 16
# Centroids that are looked at together, and the warps that hold the distances of a segment's keys to them in their
# registers.
SLOTS = 32
NUM_WARPS = 8


@triton.jit
def _apart(rows, inside, other, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, E4M3: tl.constexpr):
    """Return the squared distances of the keys at ``rows`` to the one at ``other``, ``[BLOCK_S]``, fp32."""
    apart = tl.zeros(inside.shape, tl.float32)
    for start in range(0, HEAD_DIM, WIDTH):
        keys = load_tile(rows, inside, start, HEAD_DIM, WIDTH, E4M3).to(tl.float32)
        # Of one row there is a tile as well.
        key = load_tile(other + tl.zeros(inside.shape, tl.int64), inside, start, HEAD_DIM, WIDTH, E4M3).to(tl.float32)
        difference = keys - key
        apart += tl.sum(difference * difference, axis=1)
    return apart


@triton.jit
def _to_centroids(rows, inside, weights, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, E4M3: tl.constexpr):
    """Return the squared distances of keys to the means that ``weights``, ``[BLOCK_S, SLOTS]``, make of them."""
    distances = tl.zeros(weights.shape, tl.float32)
    for start in range(0, HEAD_DIM, WIDTH):
        keys = load_tile(rows, inside, start, HEAD_DIM, WIDTH, E4M3).to(tl.float32)
        centroids = tl.sum(weights[:, :, None] * keys[:, None, :], axis=0)
        difference = keys[:, None, :] - centroids[None, :, :]
        distances += tl.sum(difference * difference, axis=2)
    return distances


@triton.jit
def _weights(joined, started, inside, slots):
    """Return by how much each key counts for the centroids ``slots``, ``[BLOCK_S, SLOTS]``, fp32.

    ``joined`` and ``started`` are the numbers of the centroids that keys joined and that start from them.
    """
    members = (inside[:, None] & (joined[:, None] == slots[None, :])).to(tl.float32)
    counts = tl.sum(members, axis=0)
    starts = (started[:, None] == slots[None, :]).to(tl.float32)
    return tl.where((counts > 0)[None, :], members / tl.maximum(counts, 1.0)[None, :], starts)


@triton.jit(
    do_not_specialize=(*VARYING_SIZES, "num_segments"), do_not_specialize_on_alignment=(*BATCH_POINTERS, "segments_ptr")
)
def choose_representatives_kernel(
    key_ptrs,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    segments_ptr,
    scores_ptr,
    num_kv_heads,
    num_tokens,
    num_segments,
    stride_page,
    stride_slot,
    stride_head,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CENTROID_WIDTH: tl.constexpr,
):
    """Add a constant to the scores of the keys of one segment that are chosen.

    ``segments`` are ``[4, num_segments]``: request, first token in it, tokens, and how many are wanted.
    """
    segment = tl.program_id(0)
    layer_head = tl.program_id(1).to(tl.int64)
    layer, head = layer_head // num_kv_heads, layer_head % num_kv_heads
    request = tl.load(segments_ptr + segment)
    first = tl.load(segments_ptr + num_segments + segment).to(tl.int32)
    held = tl.load(segments_ptr + 2 * num_segments + segment).to(tl.int32)
    wanted = tl.load(segments_ptr + 3 * num_segments + segment).to(tl.int32)
    points = tl.arange(0, BLOCK_S)
    inside = points < held
    taken = (inside & (wanted >= held)).to(tl.int32)
    if (wanted > 0) & (wanted < held):
        base = tl.load(key_ptrs + layer).to(tl.pointer_type(ELEMENT)) + head * stride_head
        page_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + request)
        rows = key_rows(base, page_ptr, first + points, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)

        all_alike = tl.where(inside, 1.0 / held, 0.0)[:, None] + tl.zeros([BLOCK_S, 1], tl.float32)
        apart = tl.sum(_to_centroids(rows, inside, all_alike, HEAD_DIM, CENTROID_WIDTH, E4M3), axis=1)
        # The number of the centroid that starts from a key.
        started = tl.full([BLOCK_S], -1, tl.int32)
        for step in range(wanted):
            best = tl.argmax(tl.where(inside & (started < 0), apart, -1.0), axis=0)
            started = tl.where(points == best, step, started)
            page = tl.load(page_ptr + (first + best) // PAGE_SIZE).to(tl.int64)
            other = page * stride_page + ((first + best) % PAGE_SIZE) * stride_slot
            to_best = _apart(rows, inside, base + other, HEAD_DIM, WIDTH, E4M3)
            apart = tl.where(step == 0, to_best, tl.minimum(apart, to_best))

        nearest = tl.full([BLOCK_S], -1, tl.int32)
        for _ in range(ROUNDS):
            least = tl.full([BLOCK_S], float("inf"), tl.float32)
            joined = nearest
            for some in range(0, BLOCK_K, SLOTS):
                slots = some + tl.arange(0, SLOTS)
                weights = _weights(joined, started, inside, slots)
                distances = _to_centroids(rows, inside, weights, HEAD_DIM, CENTROID_WIDTH, E4M3)
                distances = tl.where((slots < wanted)[None, :], distances, float("inf"))
                own = tl.min(distances, axis=1)
                nearest = tl.where(own < least, tl.argmin(distances, axis=1) + some, nearest)
                least = tl.minimum(own, least)
        for some in range(0, BLOCK_K, SLOTS):
            slots = some + tl.arange(0, SLOTS)
            weights = _weights(nearest, started, inside, slots)
            distances = _to_centroids(rows, inside, weights, HEAD_DIM, CENTROID_WIDTH, E4M3)
            for step in range(some, tl.minimum(some + SLOTS, wanted)):
                own = tl.sqrt_rn(tl.sum(tl.where((slots == step)[None, :], distances, 0.0), axis=1))
                own = tl.where(inside & (taken == 0), own, float("inf"))
                near = inside & (taken == 0) & (own <= tl.min(own, axis=0) * SAME)
                best = tl.min(tl.where(near, points, BLOCK_S), axis=0)
                taken = tl.where(points == best, 1, taken)
    scores = scores_ptr + layer_head * num_tokens + tl.load(token_indptr_ptr + request) + first + points
    is_taken = taken == 1
    tl.store(scores, tl.load(scores, mask=is_taken, other=0.0) + CHOSEN_SCORE, mask=is_taken)


def representatives_paged(
    keys: PagedBuffers,
    batch: PagedBatch,
    tables: Sequence[Tensor],
    *,
    logical_lens: Sequence[int],
    segment: int,
    rounds: int,
    centroid_width: int | None = None,
) -> Tensor:
    """Score what stays of each segment above all else, and of both the newest highest. Queues no sync.

    Args:
        keys: Keys of all layers, as cached.
        batch: The requests; ``batch.window`` is the window.
        tables: Of each request the table of its segments, ``algorithm.thoughts.next_table``, on the keys' device.
        logical_lens: Tokens ever seen of each request.
        segment: Most tokens of a segment.
        rounds: Rounds of the k-means.
        centroid_width: Dimensions at a time, a power of two.

    Returns:
        ``[num_layers, num_kv_heads, num_tokens]``, fp32, ragged by ``batch.token_indptr``; -inf in the window. Those
        before it are ``policies.base.by_choice`` of what ``policies.ThinKV`` chooses.

    Raises:
        ValueError: Sizes or devices do not fit together.

    Reference: ``rkv_sglang.algorithm.centroids.nearest_to_centroids``.
    """
    check_pool("keys", keys, batch)
    if len(tables) != batch.num_requests:
        raise ValueError(f"there are {len(tables)} tables of {batch.num_requests} requests")
    places = places_of(batch, logical_lens)
    scores = spread(places.indices.float(), places, keys, batch.window)
    request = [number for number, table in enumerate(tables) for _ in range(table.shape[1])]
    firsts = [
        table[HELD].cumsum(0) - table[HELD] + prompt_len
        for table, prompt_len in zip(tables, batch.prompt_lens_cpu, strict=True)
    ]
    held, wanted = (torch.cat([table[row] for table in tables]) for row in (HELD, AIM))
    segments = torch.stack([to_device(request, torch.int64, keys.device), torch.cat(firsts), held, wanted])
    if centroid_width is None:
        centroid_width = INTERPRETED_WIDTH if triton.knobs.runtime.interpret else CENTROID_WIDTH
    choose_representatives_kernel[(len(request), keys.num_layers * keys.num_kv_heads)](
        *(keys.pointers, batch.kv_indptr, batch.kv_indices, batch.token_indptr, segments, scores),
        *(keys.num_kv_heads, batch.num_tokens, len(request)),
        *(keys.stride_page, keys.stride_slot, keys.stride_head),
        **_constants(pass_constants(keys, WIDTH), segment, rounds, centroid_width),
        num_warps=NUM_WARPS,
        num_stages=1,
    )
    return scores


def _constants(of_pass: dict[str, Any], segment: int, rounds: int, centroid_width: int) -> dict[str, Any]:
    others = {name: value for name, value in of_pass.items() if name not in ("BLOCK", "BLOCK_D")}
    most = max(sizes_of_levels(segment)[1:], default=1)
    block_k = max(16, int(triton.next_power_of_2(most)))
    return others | {
        "ROUNDS": rounds,
        "BLOCK_S": max(16, int(triton.next_power_of_2(segment))),
        "BLOCK_K": block_k,
        "SLOTS": min(SLOTS, block_k),
        "WIDTH": WIDTH,
        "CENTROID_WIDTH": centroid_width,
    }


_TYPES = POINTER_TYPES | {"segments_ptr": "*i64", "scores_ptr": "*fp32"}
# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
    (
        f"choose_representatives_{name}_d{head_dim}_s{segment}",
        choose_representatives_kernel,
        {name: _TYPES.get(name, "i32") for name in choose_representatives_kernel.arg_names if name.islower()},
        _constants(aot_constants(dtype, head_dim), segment, 4, CENTROID_WIDTH),
        NUM_WARPS,
        1,
    )
    for name, dtype, head_dim, segment in (
        ("bf16", torch.bfloat16, 128, 128),
        ("bf16", torch.bfloat16, 64, 64),
        ("fp32", torch.float32, 256, 128),
        ("e4m3", torch.float8_e4m3fn, 128, 128),
    )
]
