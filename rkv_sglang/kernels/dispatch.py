"""One compaction of many requests, on whatever device the pool is: the one place that chooses what runs.

On a GPU, a policy with a paged scorer takes a constant number of launches for all layers, heads and requests; other
policies score in torch, layer by layer, and share the move. On a CPU everything is torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rkv_sglang.algorithm.selection import select_kept
from rkv_sglang.kernels.move import move_kept_paged, move_kept_torch
from rkv_sglang.kernels.paged_batch import FP8_DTYPES, PagedBatch, PagedBuffers, pages_needed
from rkv_sglang.kernels.score import rkv_scores_paged, snapkv_scores_paged
from rkv_sglang.kernels.score_config import padded_head_dim, padded_window
from rkv_sglang.kernels.select import select_kept_paged
from rkv_sglang.policies import RKV, Policy, ScoreInputs, SnapKV, is_stateful, needs_values

PagedScorer = Callable[[Any, PagedBuffers, PagedBatch, Tensor], Tensor]


@dataclass(frozen=True)
class History:
    """What a compaction must know of a request beyond its cache, for policies that ask for it.

    Attributes:
        logical_len: Tokens ever seen, evicted ones included.
        kept_scores: Scores that the last compaction gave to the tokens kept for their score,
            ``[num_layers, num_kv_heads, budget - window]``, fp32; None before the first.
    """

    logical_len: int
    kept_scores: Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """What a compaction kept.

    Attributes:
        indices: Of the generated tokens, ascending, then -1 past the request's budget,
            ``[num_layers, num_requests, num_kv_heads, max_budget]``, int32.
        scores: Per request the next ``History.kept_scores``; None unless the policy is stateful.
    """

    indices: Tensor
    scores: tuple[Tensor, ...] | None = None


def runs_triton(buffers: PagedBuffers) -> bool:
    """Return whether this pool is compacted by Triton kernels."""
    return buffers.device.type == "cuda"


def working_bytes_per_token(keys: PagedBuffers, window: int) -> int:
    """Return about how much memory ``compact_paged`` holds besides its arguments for each resident token of a batch.

    Per layer and head: two fp32 numbers and an int64, and for each block of at least 32 tokens a row of fp32 sums of
    keys and two of the window.
    """
    block_sums = 4 * padded_head_dim(keys.head_dim) + 8 * padded_window(window)
    return keys.num_layers * keys.num_kv_heads * (16 + block_sums // 32)


def _rkv_scores(policy: RKV, keys: PagedBuffers, batch: PagedBatch, queries: Tensor) -> Tensor:
    return rkv_scores_paged(
        keys,
        batch,
        queries,
        mix_lambda=policy.mix_lambda,
        kernel_size=policy.kernel_size,
        similarity_threshold=policy.similarity_threshold,
    )


def _snapkv_scores(policy: SnapKV, keys: PagedBuffers, batch: PagedBatch, queries: Tensor) -> Tensor:
    return snapkv_scores_paged(keys, batch, queries, kernel_size=policy.kernel_size)


# By exact class: what a subclass overrides, a kernel would not know. None of these is stateful.
PAGED_SCORERS: dict[type, PagedScorer] = {RKV: _rkv_scores, SnapKV: _snapkv_scores}


@torch.no_grad()
def compact_paged(
    keys: PagedBuffers,
    values: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    policy: Policy,
    history: Sequence[History] | None = None,
) -> Kept:
    """Score, choose and move: every request keeps its prompt and its budget of generated tokens.

    Mutates the pool in each request's tokens from ``prompt_len`` to ``prompt_len + budget``, and nothing else. Queues
    no device-to-host sync if the policy has a paged scorer.

    Args:
        keys, values: All layers of the pool, on one device.
        batch: Which requests, pages and budgets.
        queries: The window's queries after RoPE, oldest first,
            ``[num_layers, num_requests, window, num_qo_heads, head_dim]``, floating.
        history: One entry per request; default: nothing was ever evicted.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    scorer = PAGED_SCORERS.get(type(policy))
    if not runs_triton(keys):
        kept = choose_kept_torch(keys, values, batch, queries, policy, history)
        move_kept_torch(keys, values, batch, kept.indices)
        return kept
    if scorer is None:
        kept = choose_kept_torch(keys, values, batch, queries, policy, history)
    else:
        kept = Kept(select_kept_paged(scorer(policy, keys, batch, queries), batch))
    move_kept_paged(keys, values, batch, kept.indices)
    return kept


def choose_kept_torch(
    keys: PagedBuffers,
    values: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    policy: Policy,
    history: Sequence[History] | None = None,
) -> Kept:
    """Choose as ``compact_paged`` does, by the policy's own score, request by request and layer by layer."""
    wanted = [keys.num_layers, batch.num_requests, batch.window]
    if queries.dim() != 5 or list(queries.shape[:3]) != wanted:
        raise ValueError(f"queries must be [*{wanted}, num_qo_heads, head_dim], got {list(queries.shape)}")
    if history is None:
        history = [History(kv_len) for kv_len in batch.kv_lens_cpu]
    shape = (keys.num_layers, batch.num_requests, keys.num_kv_heads, batch.max_budget)
    kept_indices = torch.full(shape, -1, dtype=torch.int32, device=keys.device)
    kept_scores: list[Tensor] = []
    first_page = 0
    for request, (kv_len, prompt_len, budget) in enumerate(
        zip(batch.kv_lens_cpu, batch.prompt_lens_cpu, batch.budgets_cpu, strict=True)
    ):
        num_pages = pages_needed(kv_len, batch.page_size)
        pages = batch.kv_indices[first_page : first_page + num_pages].long()
        first_page += num_pages
        past, layer_scores = history[request], []
        for layer in range(keys.num_layers):
            inputs = ScoreInputs(
                queries=queries[layer, request],
                keys=_gather(keys, layer, pages, kv_len),
                prompt_len=prompt_len,
                values=_gather(values, layer, pages, kv_len) if needs_values(policy) else None,
                logical_len=past.logical_len,
                state=None if past.kept_scores is None else past.kept_scores[layer],
            )
            scores = policy.score(inputs)
            kept = select_kept(scores, prompt_len, batch.window, budget)
            kept_indices[layer, request, :, :budget] = kept
            layer_scores.append(scores.gather(1, prompt_len + kept[:, : budget - batch.window]))
        kept_scores.append(torch.stack(layer_scores))
    return Kept(kept_indices, tuple(kept_scores) if is_stateful(policy) else None)


def _gather(buffers: PagedBuffers, layer: int, pages: Tensor, num_tokens: int) -> Tensor:
    """Return the first tokens of some pages, dequantised, ``[num_tokens, num_kv_heads, head_dim]`` fp32. A copy."""
    tokens = buffers.tensors[layer][pages].flatten(0, 1)[:num_tokens]
    if buffers.dtype in FP8_DTYPES:
        return tokens.view(buffers.dtype).float() * buffers.scales[layer]
    return tokens.float()
