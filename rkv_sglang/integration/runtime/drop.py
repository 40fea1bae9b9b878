"""Compaction once for a whole request: blocks leave its row of ``req_to_token``, and nothing in the pool is moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rkv_sglang.cache.block_choice import BlockChoice, choose_by_place, choose_by_scores, kept_tokens
from rkv_sglang.cache.compact import DueRequest
from rkv_sglang.cache.drop import drop_blocks, warm_up_drop
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.jobs import Job, scoring
from rkv_sglang.integration.runtime.parts import Parts, Scored
from rkv_sglang.integration.startup.verify_switch import is_verifying
from rkv_sglang.policies import Policy
from rkv_sglang.sizes.compaction_plan import DropPlan, plan_drop

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler


def plan(config: PolicyConfig, *, prompt_len: int, resident_len: int, page_size: int) -> DropPlan:
    """Plan one request's compaction."""
    return plan_drop(
        prompt_len=prompt_len,
        resident_len=resident_len,
        budget=config.budget,
        window=config.window,
        block=config.block,
    )


def warm_up(config: PolicyConfig, policy: Policy, scheduler: Scheduler, scored: Scored | None) -> None:
    """Run all that a compaction runs, once, on requests that there are not; nothing changes. Nothing may run meanwhile.

    Slot 0, where nothing is ever written by a request, stands for all of theirs.
    """
    page_size = scheduler.token_to_kv_pool_allocator.page_size
    own_plan = plan(config, prompt_len=0, resident_len=config.capacity, page_size=page_size)

    def choose(plans: Sequence[DropPlan]) -> list[BlockChoice]:
        if scored is None:
            return choose_by_place([(own, own.resident_len, None) for own in plans], policy, config.window)
        num_layers, _, *shape = scored.query_window.rings.shape
        queries = scored.query_window.rings.new_zeros(num_layers, len(plans), *shape)
        slots = torch.zeros(own_plan.resident_len, dtype=torch.int64, device=scored.buffers.keys.device)
        return choose_by_scores(
            scored.buffers,
            [DueRequest(own, slots, own.resident_len) for own in plans],
            lambda part, layers: queries[layers, part],
            policy,
            config.window,
            query_bytes=scored.request_bytes,
            model=scored.attention,
        )

    warm_up_drop(scheduler.req_to_token_pool.req_to_token, own_plan, choose, page_size)


def compact(parts: Parts, policy: Policy, window: int, batch: ScheduleBatch, jobs: Sequence[Job[DropPlan]]) -> None:
    """Rewrite the rows of these requests of a batch, and give back the pages that left them.

    Mutates ``req_to_token``, the allocator and ``state.kept_state``; no length of a request yet.

    The rows are rewritten on the scheduler's stream, as SGLang writes them: it has made that stream wait until the
    forward pass in flight has read what it needs of them (``Scheduler._apply_war_barrier``), and whatever reads a row
    later, to free it, cache it or retract it, is on that stream too. A page that is given to another request here is
    written by a later forward pass, after the one in flight.
    """
    ways = ways_of(parts.scheduler.tree_cache)
    if parts.scored is None:
        with parts.timed():
            due = [(job.plan, job.logical_len, job.state.kept_state) for job in jobs]
            choices = ways.choose_by_place(due, policy, window)
            _record(jobs, choices)
            freed = _drop(ways, parts, batch, jobs, choices)
    else:
        choices = _by_scores(ways, parts, parts.scored, policy, window, batch, jobs)
        freed = _drop(ways, parts, batch, jobs, choices)
    for job, choice in zip(jobs, choices, strict=True):
        job.state.kept_state = choice.kept_state
    # By their ids, which are known to be distinct: to find that out would wait for the device.
    parts.scheduler.token_to_kv_pool_allocator.free_page_ids(freed)


@dataclass(frozen=True)
class Ways:
    """What chooses the blocks, and what takes them out of the rows."""

    choose_by_place: Callable[..., list[BlockChoice]]
    choose_by_scores: Callable[..., list[BlockChoice]]
    drop_blocks: Callable[..., torch.Tensor]


def ways_of(tree_cache: Any) -> Ways:
    """Return what compacts, with all that it does checked if a server was started so, the radix tree's slots too."""
    if not is_verifying():
        return Ways(choose_by_place, choose_by_scores, drop_blocks)
    # Here, so that other servers do not load it.
    from rkv_sglang.cache.verify.drop import choose_by_place_and_verify, choose_by_scores_and_verify, drop_and_verify

    return Ways(
        partial(choose_by_place_and_verify, choose_by_place),
        partial(choose_by_scores_and_verify, choose_by_scores, tree_cache.all_values_flatten().long()),
        partial(drop_and_verify, drop_blocks),
    )


def _drop(
    ways: Ways, parts: Parts, batch: ScheduleBatch, jobs: Sequence[Job[DropPlan]], choices: Sequence[BlockChoice]
) -> torch.Tensor:
    """Rewrite the rows and return the ids of the pages that left them."""
    return ways.drop_blocks(
        batch.req_to_token_pool.req_to_token,
        [job.req.kv.req_pool_idx for job in jobs],
        [job.plan for job in jobs],
        choices,
        parts.scheduler.token_to_kv_pool_allocator.page_size,
    )


def _by_scores(
    ways: Ways,
    parts: Parts,
    scored: Scored,
    policy: Policy,
    window: int,
    batch: ScheduleBatch,
    jobs: Sequence[Job[DropPlan]],
) -> list[BlockChoice]:
    scheduler = parts.scheduler
    with scoring(parts, scored, batch, jobs) as due:
        choices = ways.choose_by_scores(
            scored.buffers,
            due.requests,
            due.read_queries,
            policy,
            window,
            query_bytes=scored.request_bytes,
            model=scored.attention,
            sum_over_ranks=sum_over_ranks(scheduler),
        )
        _record(jobs, choices)
    if due.stream is not None:
        # The rows are rewritten by what was chosen. The device waits here, the CPU does not.
        scheduler.schedule_stream.wait_stream(due.stream)
        for choice in choices:
            for blocks in (choice.kept, choice.dropped):
                if blocks.is_cuda:
                    blocks.record_stream(scheduler.schedule_stream)
    return choices


def sum_over_ranks(scheduler: Scheduler) -> Callable[[torch.Tensor], None] | None:
    """Return what adds up, in place, a tensor of every rank that has heads of these requests, the same on all of them.

    None for one rank.
    """
    if scheduler.attn_tp_group.world_size == 1:
        return None
    return lambda totals: torch.distributed.all_reduce(totals, group=scheduler.attn_tp_group.device_group)


def _record(jobs: Sequence[Job[DropPlan]], choices: Sequence[BlockChoice]) -> None:
    """Record for a trace what stays: one row for all layers and heads."""
    for job, choice in zip(jobs, choices, strict=True):
        if job.wants_trace:
            kept: torch.Tensor = kept_tokens(job.plan, choice)
            job.record_trace(kept[None, None])
