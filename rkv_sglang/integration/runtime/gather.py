"""Compaction per layer and KV head: what each keeps is moved to the front of the request's own slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rkv_sglang.cache.compact import Compacted, compact_requests
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.jobs import Job, scoring
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.startup.verify_switch import is_verifying
from rkv_sglang.policies import Policy
from rkv_sglang.sizes.compaction_plan import GatherPlan, plan_compaction

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


def plan(config: PolicyConfig, *, prompt_len: int, resident_len: int, page_size: int) -> GatherPlan:
    """Plan one request's compaction."""
    return plan_compaction(prompt_len=prompt_len, resident_len=resident_len, budget=config.budget, page_size=page_size)


def compact(parts: Parts, policy: Policy, window: int, batch: ScheduleBatch, jobs: Sequence[Job[GatherPlan]]) -> None:
    """Compact these requests of a batch in the pool, and give back the pages behind what they keep.

    Mutates the pool, the allocator and what ``state`` carries of it; no length of a request yet.
    """
    scored, scheduler = parts.scored, parts.scheduler
    assert scored is not None, "what every head keeps is chosen by scores"
    with scoring(parts, scored, batch, jobs) as due:
        results = _compacting(scheduler.tree_cache)(
            scored.buffers,
            due.requests,
            due.read_queries,
            policy,
            window,
            query_bytes=scored.request_bytes,
            model=scored.attention,
        )
        for job, result in zip(jobs, results, strict=True):
            if result.kept_indices is not None:
                job.record_trace(result.kept_indices)
            job.state.kept_state, job.state.memory = result.kept_state, result.memory
            job.state.observed = result.observed
    allocator: Any = scheduler.token_to_kv_pool_allocator
    # Each free by itself would copy the allocator's whole list of free slots.
    allocator.free_group_begin()
    for job in jobs:
        if job.plan.freed_start < job.plan.freed_end:
            scheduler.tree_cache.free_kv_row(job.req.kv, [(job.plan.freed_start, job.plan.freed_end)])
    allocator.free_group_end()


def _compacting(tree_cache: Any) -> Callable[..., list[Compacted]]:
    """Return what compacts, with all that it does checked if a server was started so, the radix tree's slots too."""
    if not is_verifying():
        return compact_requests
    # Here, so that other servers do not load it.
    from rkv_sglang.cache.verify.gather import compact_and_verify

    return partial(compact_and_verify, compact_requests, tree_cache.all_values_flatten().long())
