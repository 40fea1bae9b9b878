# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""BeaconKV's score (arXiv 2609.04971): the attention of recent queries and of old ones that lie far apart.

Two launches: one chooses the old queries, the other computes what all of them attend to. Turning queries back and
forth is a few operations of torch on them alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.rope import Rope
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.checks import check_score_inputs
from rkv_sglang.kernels.score.config import NUM_STAGES, ScoreConfig, choose_factor_dtype, score_config
from rkv_sglang.kernels.score.device import BATCH_POINTERS, VARYING_SIZES
from rkv_sglang.kernels.score.per_head.attention import (
    attend_per_head,
    head_case,
    head_constants,
    num_warps,
    query_alignment,
)
from rkv_sglang.kernels.score.per_head.farthest import choose_farthest


@triton.jit(do_not_specialize=(*VARYING_SIZES, "num_unscored"), do_not_specialize_on_alignment=BATCH_POINTERS)
def attend_from_beacons_kernel(
    key_ptrs,
    key_scales_ptr,
    queries_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    scores_ptr,
    log_sums_ptr,
    num_kv_heads,
    num_tokens,
    num_unscored,
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
):
    """Per token: the largest attention of any query and head; -inf in the last ``num_unscored``."""
    request = tl.program_id(0)
    layer_head = tl.program_id(1).to(tl.int64)
    first_column = tl.load(token_indptr_ptr + request)
    kv_len = (tl.load(token_indptr_ptr + request + 1) - first_column).to(tl.int32)
    row = layer_head * num_tokens + first_column
    attend_per_head(
        key_ptrs,
        key_scales_ptr,
        queries_ptr,
        kv_indptr_ptr,
        kv_indices_ptr,
        scores_ptr + row,
        log_sums_ptr,
        num_kv_heads,
        kv_len - num_unscored,
        stride_page,
        stride_slot,
        stride_head,
        stride_query_layer,
        stride_query_request,
        stride_query_token,
        stride_query_head,
        softmax_scale,
        ELEMENT,
        E4M3,
        DOT_DTYPE,
        PAGE_SIZE,
        ALIGNMENT,
        QUERY_ALIGNMENT,
        LOGIT_CAP,
        WINDOW,
        GROUP_SIZE,
        HEAD_DIM,
        BLOCK,
        BLOCK_W,
        BLOCK_D,
        DOT_WIDTH,
        True,
    )
    for start in range(kv_len - num_unscored, kv_len, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        tl.store(scores_ptr + row + tokens, float("-inf"), mask=tokens < kv_len)


def beaconkv_scores_paged(
    keys: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    beacons: Sequence[Tensor | None],
    *,
    rope: Rope,
    logical_lens: Sequence[int],
    num_recent: int,
    num_beacons: int,
    model: ModelAttention = PLAIN_ATTENTION,
    config: ScoreConfig | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Score every token by what recent queries and beacons attend to, and choose the beacons. Queues no sync.

    Args:
        keys, batch, queries, model, config: As in ``rkv_scores_paged``.
        beacons: Of each request those of the compaction before, ``[num_layers, num_kv_heads, count, group, head_dim]``,
            the dtype of the queries; None before the first.
        rope: How positions turn queries.
        logical_lens: Tokens ever seen of each request.
        num_recent, num_beacons: As in ``BeaconKV``.

    Returns:
        Scores as ``rkv_scores_paged``; of each request its new beacons.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Reference: ``rkv_sglang.policies.BeaconKV``.
    """
    check_score_inputs(keys, batch, queries)
    num_layers, num_requests, window, num_qo_heads, head_dim = queries.shape
    group_size = num_qo_heads // keys.num_kv_heads
    num_old = [0 if old is None else old.shape[2] for old in beacons]
    most = max(num_old) + window
    # [num_layers, num_requests, num_kv_heads, window, group_size, head_dim]
    grouped = torch.unflatten(queries, 3, (keys.num_kv_heads, group_size)).transpose(2, 3)
    positions = [n - window + step for n in logical_lens for step in range(window)]
    back = rope.turns_on(positions, keys.device).conj().view(num_requests, 1, window, 1, rope.num_pairs)
    still = rope.with_pairs(grouped, rope.pairs(grouped) * back).to(queries.dtype)
    known = torch.zeros(
        (num_layers, num_requests, keys.num_kv_heads, most, group_size, head_dim),
        dtype=queries.dtype,
        device=keys.device,
    )
    for request, old in enumerate(beacons):
        if old is not None:
            known[:, request, :, : num_old[request]] = old
        known[:, request, :, num_old[request] : num_old[request] + window] = still[:, request]
    chosen = choose_farthest(known.flatten(4).float(), [count + window for count in num_old], num_beacons, window)
    num_heads = num_layers * keys.num_kv_heads
    found = known.take_along_dim(chosen[..., None, None], dim=3)
    ahead = rope.turns_on(logical_lens, keys.device).view(num_requests, 1, 1, 1, rope.num_pairs)
    asking = torch.cat(
        [rope.with_pairs(found, rope.pairs(found) * ahead).to(queries.dtype), grouped[:, :, :, -num_recent:]], dim=3
    )
    # [num_layers, num_requests, num_beacons + num_recent, num_qo_heads, head_dim]
    asking = asking.transpose(2, 3).flatten(3, 4).contiguous()
    factor_dtype = choose_factor_dtype(keys.dtype, queries.dtype)
    config = config or score_config(head_dim, keys.dtype, factor_dtype)
    constants = head_constants(
        keys, queries.dtype, query_alignment(asking), num_qo_heads, asking.shape[2], model.logit_cap, config
    )
    scores, log_sums = (
        torch.empty(shape, dtype=torch.float32, device=keys.device)
        for shape in (
            (num_layers, keys.num_kv_heads, batch.num_tokens),
            (num_heads, num_requests, group_size, constants["BLOCK_W"]),
        )
    )
    attend_from_beacons_kernel[(num_requests, num_heads)](
        *(keys.pointers, keys.scales, asking, batch.kv_indptr, batch.kv_indices, batch.token_indptr),
        *(scores, log_sums, keys.num_kv_heads, batch.num_tokens, window),
        *(keys.stride_page, keys.stride_slot, keys.stride_head),
        *asking.stride()[:4],
        model.scale_for(head_dim),
        **constants,
        num_warps=num_warps(config, factor_dtype, asking.shape[2]),
        num_stages=NUM_STAGES,
    )
    counts = [min(num_beacons, count + window) for count in num_old]
    # Copies: each is kept until its request's next compaction, and a view would keep those of all.
    return scores, tuple(found[:, request, :, :count].clone() for request, count in enumerate(counts))


# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
    head_case(attend_from_beacons_kernel, dtype, query_dtype, head_dim, window=32)
    for dtype, query_dtype, head_dim in (
        (torch.bfloat16, torch.bfloat16, 64),
        (torch.bfloat16, torch.bfloat16, 128),
        (torch.bfloat16, torch.bfloat16, 256),
        (torch.float32, torch.float32, 128),
        (torch.float8_e4m3fn, torch.bfloat16, 128),
    )
]
