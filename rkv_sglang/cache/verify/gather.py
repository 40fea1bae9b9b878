"""A compaction per layer and head with everything checked: what was kept, what was moved, and what must not change."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import Compacted, DueRequest
from rkv_sglang.cache.verify.recomputed import (
    CompactionDiffersError,
    checksums,
    explains,
    observed_anew,
    plain_scores,
    rows_of,
    same_bytes,
    score_tolerance,
)
from rkv_sglang.policies import Policy
from rkv_sglang.sizes.compaction_plan import GatherPlan


def compact_and_verify(
    compact: Callable[..., list[Compacted]],
    shared_slots: Tensor,
    buffers: KVBuffers,
    requests: Sequence[DueRequest[GatherPlan]],
    read_queries: Callable[[slice, slice], Tensor],
    policy: Policy,
    window: int,
    *,
    query_bytes: int = 0,
    model: ModelAttention = PLAIN_ATTENTION,
) -> list[Compacted]:
    """Call ``compact`` (``compact.compact_requests``) with the other arguments and check all that it did.

    Args:
        compact: Mutates the pool; everything else here only reads it.
        shared_slots: Slots that nobody may write, in any order, int64, on the pool's device; the requests' prompts are
            checked too.

    Returns:
        What ``compact`` did, indices only where they were asked for.

    Raises:
        CompactionDiffersError: At the first difference.
    """
    before = [rows_of(buffers, request.slots) for request in requests]
    shared = checksums(buffers, shared_slots)
    asked = [replace(request, wants_indices=True) for request in requests]
    compacted = compact(buffers, asked, read_queries, policy, window, query_bytes=query_bytes, model=model)
    if checksums(buffers, shared_slots) != shared:
        raise CompactionDiffersError("a compaction wrote a slot that the prefix cache shares; please report this")
    everything = slice(0, buffers.keys.num_layers)
    for number, (request, result, rows) in enumerate(zip(requests, compacted, before, strict=True)):
        queries = read_queries(slice(number, number + 1), everything)[:, 0]
        for problem in _problems(buffers, request, result, rows, queries, policy, window, model):
            raise CompactionDiffersError(
                f"compaction of {request.plan.generated_len} generated tokens to {request.plan.budget} after a prompt "
                f"of {request.plan.prompt_len}: {problem}; please report this"
            )
    return [
        result if request.wants_indices else replace(result, kept_indices=None)
        for request, result in zip(requests, compacted, strict=True)
    ]


def _problems(
    buffers: KVBuffers,
    request: DueRequest[GatherPlan],
    result: Compacted,
    before: tuple[Tensor, Tensor],
    queries: Tensor,
    policy: Policy,
    window: int,
    model: ModelAttention,
) -> Iterator[str]:
    """Yield what is wrong with one request, one line each."""
    plan, indices = request.plan, result.kept_indices
    if indices is None:
        yield "it did not say what it kept"
        return
    kept = indices.to(torch.int64)
    newest = torch.arange(plan.generated_len - window, plan.generated_len, device=kept.device)
    if kept.shape[2] != plan.budget or not bool((kept.diff(dim=2) > 0).all()) or int(kept.min()) < 0:
        yield f"the tokens kept are not {plan.budget} different ones in ascending order"
        return
    if not bool((kept[:, :, plan.budget - window :] == newest).all()):
        yield f"the newest {window} tokens are not kept"
        return
    for name, was, now in zip(("keys", "values"), before, rows_of(buffers, request.slots), strict=True):
        if not same_bytes(was[:, : plan.prompt_len], now[:, : plan.prompt_len]):
            yield f"the {name} of the prompt changed"
        # [num_layers, budget, num_kv_heads, 1]
        sources = plan.prompt_len + kept.transpose(1, 2).unsqueeze(3)
        moved = was.take_along_dim(sources, dim=1)
        if not same_bytes(moved, now[:, plan.prompt_len : plan.kept_len]):
            yield f"the {name} moved are not those kept"
    sliding = model.sliding_among(buffers.keys.first_layer, len(kept))
    latest = torch.arange(plan.generated_len - plan.budget, plan.generated_len, device=kept.device)
    observed = observed_anew(buffers, request, before, queries, policy, model)
    if observed is not None and (result.observed is None or not torch.equal(result.observed, observed)):
        yield "it observed something else than the policy says"
        return
    for layer in range(len(kept)):
        if layer in sliding:
            if not bool((kept[layer] == latest).all()):
                yield f"layer {layer} attends to the latest tokens alone and kept others"
            continue
        ways = plain_scores(buffers, request, layer, before, queries, policy, model, observed)
        tolerance = score_tolerance(policy)
        if not any(explains(scores, kept[layer], plan.prompt_len, window, tolerance) for scores in ways):
            yield f"layer {layer} kept other tokens than the policy's score says"
