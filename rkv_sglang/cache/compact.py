"""Compact all requests that are due in one step of an engine with a pool of slots."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import torch

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.kernels.dispatch import compact_paged, runs_triton, working_bytes_per_token
from rkv_sglang.kernels.gathered import observe_paged
from rkv_sglang.kernels.paged_batch import PagedBatch
from rkv_sglang.kernels.score.scorers import History
from rkv_sglang.policies import Policy
from rkv_sglang.sizes.compaction_plan import CompactionPlan
from rkv_sglang.sizes.prompt_plan import PromptPlan

# Requests are taken together up to this much working memory, and one that needs more is taken some layers at a time.
# Long before it is full, a GPU is busy enough. It comes out of what SGLang leaves free for activations.
WORKING_BYTES = 256 * 2**20


PlanT = TypeVar("PlanT", bound=CompactionPlan | PromptPlan)
ScoredPlanT = TypeVar("ScoredPlanT", bound=CompactionPlan)


@dataclass(frozen=True)
class DueRequest(Generic[PlanT]):
    """One request to compact.

    Attributes:
        plan: How much it keeps, and where.
        slots: Every resident token's slot, temporal order, ``[plan.resident_len]``, int64. A snapshot: the engine may
            rewrite its index map while the compaction runs on another stream.
        logical_len: Tokens ever seen, evicted ones included.
        kept_state, memory, observed: Those of the ``Compacted`` of this request's last compaction.
        wants_indices: Whether ``Compacted.kept_indices`` is asked for.
        prompt_hits: Of this request's prompt, of all layers, for a policy that keeps them; None to find them anew.
    """

    plan: PlanT
    slots: torch.Tensor
    logical_len: int
    kept_state: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    wants_indices: bool = False
    prompt_hits: PromptHits | None = None
    observed: torch.Tensor | None = None

    def history(self, layers: slice) -> History:
        """Return what the score of some layers goes on from."""
        state, memory = (None if own is None else own[layers] for own in (self.kept_state, self.memory))
        hits = None if self.prompt_hits is None else self.prompt_hits.of_layers(layers)
        return History(self.logical_len, state, memory, hits, self.observed)


@dataclass(frozen=True)
class Compacted:
    """Result of a compaction for one request.

    Attributes:
        kept_indices: Of the generated tokens that were resident, those that stay, ascending,
            ``[num_layers, num_kv_heads, budget]``, int32, on the pool's device; None unless they were asked for.
        kept_state: What a stateful policy is to be given back at the request's next compaction, as
            ``DueRequest.kept_state``, ``[num_layers, num_kv_heads, budget - window]``, fp32; None for other policies.
        memory: The same of what a policy remembers, ``[num_layers, num_kv_heads, ...]``.
        observed: The same of what a policy observes, for all layers.
    """

    kept_indices: torch.Tensor | None = None
    kept_state: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    observed: torch.Tensor | None = None


def compact_requests(
    buffers: KVBuffers,
    requests: Sequence[DueRequest[CompactionPlan]],
    read_queries: Callable[[slice, slice], torch.Tensor],
    policy: Policy,
    window: int,
    *,
    query_bytes: int = 0,
    model: ModelAttention = PLAIN_ATTENTION,
) -> list[Compacted]:
    """Keep of each request what its plan says, chosen per layer and KV head.

    Mutates the pool in each request's own slots from ``plan.prompt_len`` to ``plan.kept_len``, and fills
    ``DueRequest.prompt_hits``; the prompt's slots are only read. On a GPU, policies with a paged scorer make no
    device-to-host copy, and the working memory at any time is at most ``WORKING_BYTES``, or that of one layer of the
    longest request if this is more.

    Args:
        read_queries: Given a slice of ``requests`` and one of the layers, returns their window's queries after RoPE,
            oldest first, ``[num_layers, num_requests, window, num_qo_heads, head_dim]``. Called when they are needed,
            so that never all are held at once.
        policy: Scores the tokens.
        window: Most recent tokens, kept whatever their score.
        query_bytes: What ``read_queries`` allocates for each request, all layers together.
        model: How the model attends.

    Returns:
        Per request, in order, what was kept.
    """
    compacted: list[Compacted] = []
    for part, batch, layers_of_part in split_work(buffers, requests, window, query_bytes):
        history = [History(due.logical_len, observed=due.observed) for due in requests[part]]
        observed = observe_paged(buffers.keys, batch, partial(read_queries, part), policy, history, model)
        together = [replace(due, observed=own) for due, own in zip(requests[part], observed, strict=True)]
        of_layers = [
            _compact_layers(buffers, together, batch, read_queries(part, layers), policy, layers, model)
            for layers in layers_of_part
        ]
        compacted += [
            replace(_join(own), observed=due.observed)
            for due, own in zip(together, zip(*of_layers, strict=True), strict=True)
        ]
        mark_filled(together)
    return compacted


def _compact_layers(
    buffers: KVBuffers,
    requests: Sequence[DueRequest[CompactionPlan]],
    batch: PagedBatch,
    queries: torch.Tensor,
    policy: Policy,
    layers: slice,
    model: ModelAttention,
) -> list[Compacted]:
    """Compact some layers of the requests of ``batch``; what is returned has these layers only."""
    buffers = buffers.of_layers(layers)
    history = [request.history(layers) for request in requests]
    kept = compact_paged(buffers.keys, buffers.values, batch, queries, policy, history, model)
    nothing = [None] * len(requests)
    return [
        # A copy: a view would hold the indices of all requests of the part until the last part is done.
        Compacted(
            kept.indices[:, i, :, : request.plan.budget].clone() if request.wants_indices else None,
            (kept.state or nothing)[i],
            (kept.memory or nothing)[i],
        )
        for i, request in enumerate(requests)
    ]


def mark_filled(requests: Sequence[DueRequest[PlanT]]) -> None:
    """Note that all layers of these requests were scored, so that their ``prompt_hits`` are filled."""
    for request in requests:
        if request.prompt_hits is not None:
            request.prompt_hits.is_filled = True


def _join(of_layers: Sequence[Compacted]) -> Compacted:
    """Put the layers of one request together again."""
    if len(of_layers) == 1:
        return of_layers[0]
    joined = []
    for name in ("kept_indices", "kept_state", "memory"):
        parts = [part for of_layer in of_layers if (part := getattr(of_layer, name)) is not None]
        joined.append(torch.cat(parts) if parts else None)
    return Compacted(*joined)


def split_work(
    buffers: KVBuffers, requests: Sequence[DueRequest[ScoredPlanT]], window: int, query_bytes: int
) -> Iterator[tuple[slice, PagedBatch, list[slice]]]:
    """Yield parts of the work that fit into the working memory: which requests, as a batch, and which layers at a time.

    Args:
        query_bytes: As in ``compact_requests``.
    """
    token_bytes = working_bytes_per_token(buffers.keys, window)
    num_tokens = [request.plan.resident_len + query_bytes // token_bytes for request in requests]
    most_tokens = most_tokens_together(buffers, token_bytes)
    for part in split_requests(num_tokens, most_tokens):
        plans = [request.plan for request in requests[part]]
        batch = PagedBatch.from_slots(
            torch.cat([request.slots for request in requests[part]]),
            kv_lens=[plan.resident_len for plan in plans],
            prompt_lens=[plan.prompt_len for plan in plans],
            budgets=[plan.budget for plan in plans],
            window=window,
        )
        longest = max(num_tokens[part])
        yield part, batch, list(split_layers(buffers.keys.num_layers, longest * len(plans), most_tokens))


def split_requests(num_tokens: Sequence[int], most_tokens: int) -> Iterator[slice]:
    """Cut requests into runs that take the memory of at most ``most_tokens`` tokens; a longer one is a run of its own.

    What is chosen is a rectangle, so every request of a run takes as much as the longest.
    """
    start = longest = 0
    for index, length in enumerate(num_tokens):
        if index > start and (index + 1 - start) * max(longest, length) > most_tokens:
            yield slice(start, index)
            start, longest = index, 0
        longest = max(longest, length)
    if num_tokens:
        yield slice(start, len(num_tokens))


def split_layers(num_layers: int, num_tokens: int, most_tokens: int) -> Iterator[slice]:
    """Cut the layers of ``num_tokens`` tokens into runs, equal but for the last, of the memory of ``most_tokens``.

    That memory is counted in tokens of all layers. A run has at least one layer; 0 ``most_tokens`` leaves them whole.
    """
    step = num_layers if most_tokens == 0 else max(1, min(num_layers, most_tokens * num_layers // num_tokens))
    for first in range(0, num_layers, step):
        yield slice(first, min(first + step, num_layers))


def most_tokens_together(buffers: KVBuffers, token_bytes: int) -> int:
    """Return how many resident tokens are compacted together; 0 if each request is, alone and whole."""
    # On a CPU its keys stay in the CPU's cache, and nothing is gained by more; torch takes layer by layer anyway.
    return WORKING_BYTES // token_bytes if runs_triton(buffers.keys) else 0
