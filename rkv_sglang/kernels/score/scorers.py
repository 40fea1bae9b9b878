"""Scorers of a whole batch in a constant number of launches, by policy, and how their arguments are made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.attention import rkv_scores_paged
from rkv_sglang.kernels.score.mean_keys import keydiff_scores_paged
from rkv_sglang.kernels.score.per_head.beaconkv import beaconkv_scores_paged
from rkv_sglang.kernels.score.per_head.block_means import manifoldkv_scores_paged
from rkv_sglang.kernels.score.per_head.gkv import gkv_scores_paged
from rkv_sglang.kernels.score.per_head.half import half_scores_paged
from rkv_sglang.kernels.score.per_head.received import h2o_scores_paged, snapkv_scores_paged
from rkv_sglang.kernels.score.per_head.representatives import representatives_paged
from rkv_sglang.kernels.score.per_head.triattention import triattention_scores_paged
from rkv_sglang.kernels.score.places import places_of, spread
from rkv_sglang.kernels.score.values import longflow_scores_paged
from rkv_sglang.policies import (
    GKV,
    H2O,
    RKV,
    BeaconKV,
    GivenScores,
    Half,
    KeyDiff,
    LongFlow,
    ManifoldKV,
    Random,
    RandomAttention,
    SnapKV,
    StreamingLLM,
    ThinKV,
    TriAttention,
    is_stateful,
)


@dataclass(frozen=True)
class History:
    """Past of a request that its cache does not tell, for policies that ask for it.

    Attributes:
        logical_len: Tokens ever seen, evicted ones included.
        kept_state: The state that the last compaction gave to the tokens kept for their score,
            ``[num_layers, num_kv_heads, budget - window]``, fp32; None before the first.
        memory: What the policy remembers from it, ``[num_layers, num_kv_heads, ...]``; None before the first.
        prompt_hits: What the prompt finds within the prompt, written unless it is filled; None to find it anew.
        observed: What the policy observed of the request at this compaction, for one that observes, or at the last.
    """

    logical_len: int
    kept_state: Tensor | None = None
    memory: Tensor | None = None
    prompt_hits: PromptHits | None = None
    observed: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PagedInputs:
    """Arguments of a scorer of a whole batch; as in ``dispatch.compact_paged``."""

    keys: PagedBuffers
    values: PagedBuffers
    batch: PagedBatch
    queries: Tensor
    history: Sequence[History]
    model: ModelAttention = PLAIN_ATTENTION

    def kept_before(self, scores: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, per request that was compacted before, its columns of ``scores`` and the state they had then."""
        pairs = []
        start = 0
        for kv_len, prompt_len, past in zip(
            self.batch.kv_lens_cpu, self.batch.prompt_lens_cpu, self.history, strict=True
        ):
            if past.kept_state is not None:
                first = start + prompt_len
                pairs.append((scores[:, :, first : first + past.kept_state.shape[2]], past.kept_state))
            start += kv_len
        return pairs


@dataclass(frozen=True)
class PagedScored:
    """What a scorer returns whose policy is given back more than its scores.

    Attributes:
        scores: ``[num_layers, num_kv_heads, num_tokens]``.
        state: What travels with the tokens in their place, the same shape.
        memory: Of each request ``[num_layers, num_kv_heads, ...]``; None where nothing is remembered.
    """

    scores: Tensor
    state: Tensor
    memory: tuple[Tensor, ...] | None = None


def scored_paged(result: Tensor | PagedScored) -> PagedScored:
    """Return what a scorer returned, with the state that it means."""
    return result if isinstance(result, PagedScored) else PagedScored(result, result)


PagedScorer = Callable[[Any, PagedInputs], Tensor | PagedScored]


def _rkv(policy: RKV, inputs: PagedInputs) -> Tensor:
    return rkv_scores_paged(
        inputs.keys,
        inputs.batch,
        inputs.queries,
        mix_lambda=policy.mix_lambda,
        kernel_size=policy.kernel_size,
        similarity_threshold=policy.similarity_threshold,
        model=inputs.model,
        prompt_hits=[past.prompt_hits for past in inputs.history],
    )


def _snapkv(policy: SnapKV, inputs: PagedInputs) -> Tensor:
    return snapkv_scores_paged(
        inputs.keys, inputs.batch, inputs.queries, kernel_size=policy.kernel_size, model=inputs.model
    )


def _h2o(policy: H2O, inputs: PagedInputs) -> Tensor:
    scores = h2o_scores_paged(inputs.keys, inputs.batch, inputs.queries, model=inputs.model)
    for received, before in inputs.kept_before(scores):
        received += before
    return scores


def _keydiff(policy: KeyDiff, inputs: PagedInputs) -> Tensor:
    return keydiff_scores_paged(inputs.keys, inputs.batch)


def _manifoldkv(policy: ManifoldKV, inputs: PagedInputs) -> Tensor:
    return manifoldkv_scores_paged(inputs.keys, inputs.batch, mean_tokens=policy.mean_tokens)


def _longflow(policy: LongFlow, inputs: PagedInputs) -> Tensor:
    return longflow_scores_paged(inputs.keys, inputs.values, inputs.batch, inputs.queries, model=inputs.model)


def _by_place(policy: StreamingLLM | Random, inputs: PagedInputs) -> Tensor:
    """Score for a policy that gives all layers and heads the same."""
    places = places_of(inputs.batch, [past.logical_len for past in inputs.history])
    scores = spread(policy.score_places(places), places, inputs.keys, inputs.batch.window)
    for scored, before in inputs.kept_before(scores) if is_stateful(policy) else ():
        scored.copy_(before)
    return scores


def _gkv(policy: GKV, inputs: PagedInputs) -> PagedScored:
    batch, keys = inputs.batch, inputs.keys
    shape = (keys.num_layers, keys.num_kv_heads, batch.num_tokens)
    state = torch.full(shape, -torch.inf, dtype=torch.float32, device=keys.device)
    for columns, before in inputs.kept_before(state):
        columns.copy_(before)
    scores = gkv_scores_paged(
        keys,
        batch,
        inputs.queries,
        state,
        importance_weight=policy.importance_weight,
        decay=policy.decay,
        kernel_size=policy.kernel_size,
        similarity_threshold=policy.similarity_threshold,
        model=inputs.model,
    )
    return PagedScored(scores, state)


def _half(policy: Half, inputs: PagedInputs) -> Tensor:
    return half_scores_paged(
        inputs.keys,
        inputs.batch,
        inputs.queries,
        logical_lens=[past.logical_len for past in inputs.history],
        mix_lambda=policy.mix_lambda,
        kernel_size=policy.kernel_size,
        similarity_threshold=policy.similarity_threshold,
        seed=policy.seed,
        model=inputs.model,
    )


def _triattention(policy: TriAttention, inputs: PagedInputs) -> Tensor:
    rope, statistics = inputs.model.rope, inputs.model.statistics
    if rope is None or statistics is None:
        raise ValueError("policy triattention needs the model's rotary positions and statistics of its queries")
    return triattention_scores_paged(
        inputs.keys,
        inputs.batch,
        rope=rope,
        statistics=statistics.of_layers(inputs.keys.first_layer, inputs.keys.num_layers),
        logical_lens=[past.logical_len for past in inputs.history],
    )


def _beaconkv(policy: BeaconKV, inputs: PagedInputs) -> PagedScored:
    if inputs.model.rope is None:
        raise ValueError("policy beaconkv needs the model's rotary positions")
    scores, beacons = beaconkv_scores_paged(
        inputs.keys,
        inputs.batch,
        inputs.queries,
        [past.memory for past in inputs.history],
        rope=inputs.model.rope,
        logical_lens=[past.logical_len for past in inputs.history],
        num_recent=policy.num_recent,
        num_beacons=policy.num_beacons,
        model=inputs.model,
    )
    return PagedScored(scores, scores, beacons)


def _thinkv(policy: ThinKV, inputs: PagedInputs) -> Tensor:
    batch, device = inputs.batch, inputs.keys.device
    rooms = zip(batch.kv_lens_cpu, batch.prompt_lens_cpu, batch.budgets_cpu, strict=True)
    tables = [
        policy.table_of(past.observed, kv_len - batch.window - prompt_len, budget - batch.window, device)
        for past, (kv_len, prompt_len, budget) in zip(inputs.history, rooms, strict=True)
    ]
    return representatives_paged(
        inputs.keys,
        batch,
        tables,
        logical_lens=[past.logical_len for past in inputs.history],
        segment=policy.buffer,
        rounds=policy.rounds,
    )


def _random_attention(policy: RandomAttention, inputs: PagedInputs) -> Tensor:
    keys = inputs.keys
    places = places_of(inputs.batch, [past.logical_len for past in inputs.history])
    layers, heads = (
        torch.arange(first, first + count, device=keys.device)
        for first, count in ((keys.first_layer, keys.num_layers), (keys.first_kv_head, keys.num_kv_heads))
    )
    hashed = policy.of_tokens(places).repeat(keys.num_layers, keys.num_kv_heads, 1)
    return spread(policy.of_heads(hashed, layers, heads), places, keys, inputs.batch.window)


def _given(policy: GivenScores, inputs: PagedInputs) -> Tensor:
    first = inputs.keys.first_layer - policy.first_layer
    return policy.scores[first : first + inputs.keys.num_layers]


# By exact class: what a subclass overrides, a kernel would not know.
PAGED_SCORERS: dict[type, PagedScorer] = {
    RKV: _rkv,
    SnapKV: _snapkv,
    H2O: _h2o,
    StreamingLLM: _by_place,
    KeyDiff: _keydiff,
    ManifoldKV: _manifoldkv,
    LongFlow: _longflow,
    Random: _by_place,
    RandomAttention: _random_attention,
    GKV: _gkv,
    Half: _half,
    TriAttention: _triattention,
    BeaconKV: _beaconkv,
    ThinKV: _thinkv,
    GivenScores: _given,
}


def state_of_kept(state: Tensor, kept_indices: Tensor, batch: PagedBatch) -> tuple[Tensor, ...]:
    """Return the state of the tokens kept for their score: per request the next ``History.kept_state``.

    Args:
        state: ``[num_layers, num_kv_heads, num_tokens]``, fp32.
        kept_indices: ``[num_layers, num_requests, num_kv_heads, max_budget]``, int32, as ``select_kept_paged``'s.
    """
    num_best = batch.max_budget - batch.window
    first = (batch.token_indptr[:-1] + batch.prompt_lens)[None, :, None, None]
    # Past a request's own budget stands -1, which is cut off below.
    columns = (first + kept_indices[..., :num_best]).clamp(0, batch.num_tokens - 1)
    rows = state.unsqueeze(1).expand(-1, batch.num_requests, -1, -1)
    best = torch.gather(rows, 3, columns)
    # Copies: each is kept until its request's next compaction, and a view would keep those of all.
    return tuple(best[:, i, :, : budget - batch.window].clone() for i, budget in enumerate(batch.budgets_cpu))
