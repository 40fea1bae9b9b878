"""A prompt's compaction with everything checked: what was chosen, where it went, and what must not change."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest
from rkv_sglang.cache.verify.recomputed import (
    CompactionDiffersError,
    checksums,
    explains,
    plain_scores,
    rows_of,
    same_bytes,
    score_tolerance,
)
from rkv_sglang.config import NUM_FIRST_KEPT
from rkv_sglang.policies import Policy
from rkv_sglang.sizes.prompt_plan import PromptPlan


def compact_prompts_and_verify(
    compact: Callable[..., list[Tensor | None]],
    shared_slots: Tensor,
    buffers: KVBuffers,
    requests: Sequence[DueRequest[PromptPlan]],
    new_slots: Sequence[Tensor],
    read_queries: Callable[[slice, slice], Tensor],
    policy: Policy,
    window: int,
    *,
    query_bytes: int = 0,
    model: ModelAttention = PLAIN_ATTENTION,
) -> list[Tensor | None]:
    """Call ``compact`` (``prompt.compact_prompts``) with the other arguments and check all that it did.

    Args:
        shared_slots: As in ``compact_and_verify``; neither they nor what the requests held may change.

    Raises:
        CompactionDiffersError: At the first difference.
    """
    held = torch.cat([shared_slots, *(request.slots for request in requests)])
    before = checksums(buffers, held)
    asked = [replace(request, wants_indices=True) for request in requests]
    results = compact(buffers, asked, new_slots, read_queries, policy, window, query_bytes=query_bytes, model=model)
    if checksums(buffers, held) != before:
        raise CompactionDiffersError("a prompt's compaction wrote slots that were in use; please report this")
    everything = slice(0, buffers.keys.num_layers)
    for number, (request, slots, kept) in enumerate(zip(requests, new_slots, results, strict=True)):
        queries = read_queries(slice(number, number + 1), everything)[:, 0]
        for problem in _problems(buffers, request, slots, kept, queries, policy, window, model):
            raise CompactionDiffersError(
                f"compaction of a prompt of {request.plan.prompt_len} tokens to {request.plan.budget}: {problem}; "
                "please report this"
            )
    return [kept if request.wants_indices else None for request, kept in zip(requests, results, strict=True)]


def copy_slots_and_verify(
    copy: Callable[..., None], shared_slots: Tensor, layers: Sequence[Tensor], slots: Tensor, new_slots: Tensor
) -> None:
    """Call ``copy`` (``prompt.copy_slots``) with the other arguments and check that it did that and nothing else.

    Raises:
        CompactionDiffersError: At the first difference.
    """
    held = torch.cat([shared_slots, slots])
    before = [layer[held] for layer in layers]
    copy(layers, slots, new_slots)
    for layer, was in zip(layers, before, strict=True):
        if not same_bytes(layer[held], was):
            raise CompactionDiffersError("a prompt's compaction wrote slots that were in use; please report this")
        if not same_bytes(layer[new_slots], was[len(shared_slots) :]):
            raise CompactionDiffersError("what stays of a prompt was not copied as it was; please report this")


def _problems(
    buffers: KVBuffers,
    request: DueRequest[PromptPlan],
    new_slots: Tensor,
    kept: Tensor | None,
    queries: Tensor,
    policy: Policy,
    window: int,
    model: ModelAttention,
) -> Iterator[str]:
    """Yield what is wrong with one request, one line each."""
    plan = request.plan
    if kept is None:
        yield "it did not say what it kept"
        return
    if kept.shape[2] != plan.budget or not bool((kept.diff(dim=2) > 0).all()) or int(kept.min()) < 0:
        yield f"the tokens kept are not {plan.budget} different ones in ascending order"
        return
    first = torch.arange(NUM_FIRST_KEPT, device=kept.device)
    last = torch.arange(plan.prompt_len - window, plan.prompt_len, device=kept.device)
    if not bool((kept[:, :, :NUM_FIRST_KEPT] == first).all() and (kept[:, :, plan.budget - window :] == last).all()):
        yield f"the first {NUM_FIRST_KEPT} and the last {window} tokens are not kept"
        return
    rows = rows_of(buffers, request.slots)
    generated = torch.arange(plan.kept_len - plan.budget, device=kept.device) + plan.prompt_len
    # [num_layers, kept_len, num_kv_heads, 1]
    sources = torch.cat([kept, generated.expand(*kept.shape[:2], -1)], dim=2).transpose(1, 2).unsqueeze(3)
    for name, was, now in zip(("keys", "values"), rows, rows_of(buffers, new_slots), strict=True):
        if not same_bytes(was.take_along_dim(sources, dim=1), now):
            yield f"the {name} copied are not those kept"
    scored = replace(request, plan=plan.of_scores)  # type: ignore[arg-type]
    for layer in range(len(kept)):
        ways = plain_scores(buffers, scored, layer, rows, queries, policy, model)
        candidates = (scores[:, : plan.prompt_len - window] for scores in ways)
        own, tolerance = kept[layer, :, NUM_FIRST_KEPT:] - NUM_FIRST_KEPT, score_tolerance(policy)
        if not any(explains(scores, own, NUM_FIRST_KEPT, window, tolerance) for scores in candidates):
            yield f"layer {layer} kept other tokens than the policy's score says"
