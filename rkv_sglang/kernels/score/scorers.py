"""Scorers of a whole batch in a constant number of launches, by policy, and how their arguments are made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.attention import h2o_scores_paged, rkv_scores_paged, snapkv_scores_paged
from rkv_sglang.kernels.score.mean_keys import keydiff_scores_paged, manifoldkv_scores_paged
from rkv_sglang.kernels.score.places import places_of, spread
from rkv_sglang.kernels.score.values import longflow_scores_paged
from rkv_sglang.policies import (
    H2O,
    RKV,
    KeyDiff,
    LongFlow,
    ManifoldKV,
    Random,
    RandomAttention,
    SnapKV,
    StreamingLLM,
    is_stateful,
)


@dataclass(frozen=True)
class History:
    """Past of a request that its cache does not tell, for policies that ask for it.

    Attributes:
        logical_len: Tokens ever seen, evicted ones included.
        kept_scores: Scores that the last compaction gave to the tokens kept for their score,
            ``[num_layers, num_kv_heads, budget - window]``, fp32; None before the first.
        prompt_hits: What the prompt finds within the prompt, written unless it is filled; None to find it anew.
    """

    logical_len: int
    kept_scores: Tensor | None = None
    prompt_hits: PromptHits | None = None


@dataclass(frozen=True, kw_only=True)
class PagedInputs:
    """Arguments of a scorer of a whole batch; as in ``dispatch.compact_paged``."""

    keys: PagedBuffers
    values: PagedBuffers
    batch: PagedBatch
    queries: Tensor
    history: Sequence[History]

    def kept_before(self, scores: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, per request that was compacted before, its columns of ``scores`` and what they scored then."""
        pairs = []
        start = 0
        for kv_len, prompt_len, past in zip(
            self.batch.kv_lens_cpu, self.batch.prompt_lens_cpu, self.history, strict=True
        ):
            if past.kept_scores is not None:
                first = start + prompt_len
                pairs.append((scores[:, :, first : first + past.kept_scores.shape[2]], past.kept_scores))
            start += kv_len
        return pairs


PagedScorer = Callable[[Any, PagedInputs], Tensor]


def _rkv(policy: RKV, inputs: PagedInputs) -> Tensor:
    return rkv_scores_paged(
        inputs.keys,
        inputs.batch,
        inputs.queries,
        mix_lambda=policy.mix_lambda,
        kernel_size=policy.kernel_size,
        similarity_threshold=policy.similarity_threshold,
        prompt_hits=[past.prompt_hits for past in inputs.history],
    )


def _snapkv(policy: SnapKV, inputs: PagedInputs) -> Tensor:
    return snapkv_scores_paged(inputs.keys, inputs.batch, inputs.queries, kernel_size=policy.kernel_size)


def _h2o(policy: H2O, inputs: PagedInputs) -> Tensor:
    scores = h2o_scores_paged(inputs.keys, inputs.batch, inputs.queries)
    for received, before in inputs.kept_before(scores):
        received += before
    return scores


def _keydiff(policy: KeyDiff, inputs: PagedInputs) -> Tensor:
    return keydiff_scores_paged(inputs.keys, inputs.batch)


def _manifoldkv(policy: ManifoldKV, inputs: PagedInputs) -> Tensor:
    return manifoldkv_scores_paged(inputs.keys, inputs.batch, mean_tokens=policy.mean_tokens)


def _longflow(policy: LongFlow, inputs: PagedInputs) -> Tensor:
    return longflow_scores_paged(inputs.keys, inputs.values, inputs.batch, inputs.queries)


def _by_place(policy: StreamingLLM | Random, inputs: PagedInputs) -> Tensor:
    """Score for a policy that gives all layers and heads the same."""
    places = places_of(inputs.batch, [past.logical_len for past in inputs.history])
    scores = spread(policy.score_places(places), places, inputs.keys, inputs.batch.window)
    for scored, before in inputs.kept_before(scores) if is_stateful(policy) else ():
        scored.copy_(before)
    return scores


def _random_attention(policy: RandomAttention, inputs: PagedInputs) -> Tensor:
    keys = inputs.keys
    places = places_of(inputs.batch, [past.logical_len for past in inputs.history])
    layers, heads = (
        torch.arange(first, first + count, device=keys.device)
        for first, count in ((keys.first_layer, keys.num_layers), (keys.first_kv_head, keys.num_kv_heads))
    )
    hashed = policy.of_tokens(places).repeat(keys.num_layers, keys.num_kv_heads, 1)
    return spread(policy.of_heads(hashed, layers, heads), places, keys, inputs.batch.window)


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
}


def scores_of_kept(scores: Tensor, kept_indices: Tensor, batch: PagedBatch) -> tuple[Tensor, ...]:
    """Return what the tokens kept for their score scored: per request the next ``History.kept_scores``.

    Args:
        scores: ``[num_layers, num_kv_heads, num_tokens]``, fp32.
        kept_indices: ``[num_layers, num_requests, num_kv_heads, max_budget]``, int32, as ``select_kept_paged``'s.
    """
    num_best = batch.max_budget - batch.window
    first = (batch.token_indptr[:-1] + batch.prompt_lens)[None, :, None, None]
    # Past a request's own budget stands -1, which is cut off below.
    columns = (first + kept_indices[..., :num_best]).clamp(0, batch.num_tokens - 1)
    rows = scores.unsqueeze(1).expand(-1, batch.num_requests, -1, -1)
    best = torch.gather(rows, 3, columns)
    # Copies: each is kept until its request's next compaction, and a view would keep those of all.
    return tuple(best[:, i, :, : budget - batch.window].clone() for i, budget in enumerate(batch.budgets_cpu))
