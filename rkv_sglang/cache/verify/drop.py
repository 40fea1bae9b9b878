"""A compaction by the map alone with everything checked: the choice of blocks, the rows, the pages that became free."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.cache.block_choice import BlockChoice
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest
from rkv_sglang.cache.verify.recomputed import (
    CompactionDiffersError,
    checksums,
    plain_scores,
    rows_of,
    score_tolerance,
)
from rkv_sglang.policies import Places, Policy
from rkv_sglang.sizes.compaction_plan import DropPlan


def choose_by_place_and_verify(
    choose: Callable[..., list[BlockChoice]],
    requests: Sequence[tuple[DropPlan, int, Tensor | None]],
    policy: Policy,
    window: int,
) -> list[BlockChoice]:
    """Call ``choose`` (``block_choice.choose_by_place``) with the other arguments and check its choices one by one.

    Raises:
        CompactionDiffersError: At the first difference.
    """
    choices = choose(requests, policy, window)
    for (plan, logical_len, before), choice in zip(requests, choices, strict=True):
        indices = torch.arange(plan.prompt_len, plan.resident_len - window)
        lens = (torch.full_like(indices, count) for count in (plan.resident_len, logical_len))
        scores = policy.score_places(Places(indices, *lens))  # type: ignore[attr-defined]
        if before is not None:
            scores[: len(before)] = before
        _check(plan, choice, [scores.double()], score_tolerance(policy))
    return choices


def choose_by_scores_and_verify(
    choose: Callable[..., list[BlockChoice]],
    shared_slots: Tensor,
    buffers: KVBuffers,
    requests: Sequence[DueRequest[DropPlan]],
    read_queries: Callable[[slice, slice], Tensor],
    policy: Policy,
    window: int,
    *,
    query_bytes: int = 0,
    model: ModelAttention = PLAIN_ATTENTION,
    sum_over_ranks: Callable[[Tensor], None] | None = None,
) -> list[BlockChoice]:
    """Call ``choose`` (``block_choice.choose_by_scores``) with the other arguments and check all that it did.

    Args:
        shared_slots: As in ``compact_and_verify``; neither they nor what the requests hold may change.

    Raises:
        CompactionDiffersError: At the first difference.
    """
    slots = torch.cat([shared_slots, *(request.slots for request in requests)])
    before = checksums(buffers, slots)
    choices = choose(
        buffers,
        requests,
        read_queries,
        policy,
        window,
        query_bytes=query_bytes,
        model=model,
        sum_over_ranks=sum_over_ranks,
    )
    if checksums(buffers, slots) != before:
        raise CompactionDiffersError("a choice of blocks changed the KV cache; please report this")
    layers = range(buffers.keys.num_layers)
    sliding = model.sliding_among(buffers.keys.first_layer, len(layers))
    for number, (request, choice) in enumerate(zip(requests, choices, strict=True)):
        queries = read_queries(slice(number, number + 1), slice(0, len(layers)))[:, 0]
        rows = rows_of(buffers, request.slots)
        ways = zip(
            *(plain_scores(buffers, request, layer, rows, queries, policy, model) for layer in layers), strict=True
        )
        # Of all heads, of the layers that attend to more than the latest tokens, and of all ranks, which must come here
        # equally often.
        totals = [
            torch.stack([scores.sum(dim=0) * (layer not in sliding) for layer, scores in enumerate(way)]).sum(dim=0)
            for way in ways
        ]
        if sum_over_ranks is not None:
            for total in totals:
                sum_over_ranks(total)
        candidates = [total[request.plan.prompt_len :].double() for total in totals]
        _check(request.plan, choice, candidates, score_tolerance(policy))
    return choices


def drop_and_verify(
    drop: Callable[..., Tensor],
    req_to_token: Tensor,
    rows: Sequence[int],
    plans: Sequence[DropPlan],
    choices: Sequence[BlockChoice],
    page_size: int,
) -> Tensor:
    """Call ``drop`` (``drop.drop_blocks``) with the other arguments and check the rows and the pages it returns.

    Raises:
        CompactionDiffersError: At the first difference.
    """
    before = req_to_token.clone()
    freed = drop(req_to_token, rows, plans, choices, page_size)
    pages: list[int] = []
    for row, plan, choice in zip(rows, plans, choices, strict=True):
        was = before[row, : plan.resident_len].tolist()
        gone = [block * plan.block + offset for block in choice.dropped.tolist() for offset in range(plan.block)]
        stays = sorted(set(range(plan.resident_len)).difference(gone))
        if req_to_token[row, : plan.kept_len].tolist() != [was[place] for place in stays]:
            raise _difference(plan, "the row is not what stays of it")
        pages += [was[place] // page_size for place in gone[::page_size]]
    if freed.tolist() != pages or len(set(pages)) != len(pages):
        raise CompactionDiffersError("pages were freed that are not those of the blocks dropped; please report this")
    others = torch.ones(len(before), dtype=torch.bool).index_fill(0, torch.tensor(rows), False).to(before.device)
    if not torch.equal(req_to_token[others], before[others]):
        raise CompactionDiffersError("a drop of blocks changed another request's row; please report this")
    return freed


def _check(plan: DropPlan, choice: BlockChoice, ways: Sequence[Tensor], tolerance: float) -> None:
    """Check that the blocks are those that the plan speaks of, and that those of the lowest mean went.

    Args:
        ways: Scores of the generated tokens before the window, of which one must explain the choice, fp64.
        tolerance: As ``score_tolerance`` says it of the policy.
    """
    kept, dropped = choice.kept.tolist(), choice.dropped.tolist()
    is_ascending = kept == sorted(kept) and dropped == sorted(dropped)
    blocks = list(range(plan.first_block, plan.end_block))
    if not is_ascending or sorted(kept + dropped) != blocks or len(dropped) != plan.num_dropped:
        raise _difference(plan, f"it keeps the blocks {kept} and drops {dropped}")
    for scores in ways:
        starts = [block * plan.block - plan.prompt_len for block in blocks]
        means = {
            block: float(scores[start : start + plan.block].mean()) for block, start in zip(blocks, starts, strict=True)
        }
        means = {block: math.inf if math.isnan(mean) else mean for block, mean in means.items()}
        spread = max(means.values()) - min(means.values())
        slack = tolerance * spread if math.isfinite(spread) else 0.0
        if not kept or min(means[block] for block in kept) >= max(means[block] for block in dropped) - slack:
            return
    raise _difference(plan, f"it drops the blocks {dropped}, which are not those of the lowest mean score")


def _difference(plan: DropPlan, what: str) -> CompactionDiffersError:
    return CompactionDiffersError(
        f"compaction of {plan.generated_len} generated tokens to {plan.budget} after a prompt of {plan.prompt_len}, in "
        f"blocks of {plan.block}: {what}; please report this"
    )
