"""Compaction of prompts: a request goes on in slots of its own, and the tree keeps its prompt.

It happens once since the last prefill, before anything else of the request is compacted, when ``window`` tokens were
decoded: their queries are there whatever the prefix cache held. All that the request keeps is copied to fresh slots;
then they are its row, what of the old one was its own goes back, and the lock on its path of the tree is given up. From
then on it owns its whole row, and nothing of it is ever cached: the tree keys tokens, and here some are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rkv_sglang.config import HEAD, PolicyConfig
from rkv_sglang.integration.runtime.jobs import Job, refuse_odd_lengths
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.prompts.blocks import copy_blocks
from rkv_sglang.integration.runtime.prompts.heads import copy_heads
from rkv_sglang.integration.runtime.prompts.slots import alloc_slots
from rkv_sglang.integration.runtime.requests import state_of
from rkv_sglang.policies import Policy
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.prompt_plan import PromptPlan, kept_of_prompt

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


def jobs_with_room(
    parts: Parts, batch: ScheduleBatch, due: Sequence[int], configs: Sequence[PolicyConfig | None]
) -> dict[int, Job[PromptPlan]]:
    """Plan the compaction of those of some prompts, in their order, for whose new slots the pool has room.

    Admission reserved it; only requests without a policy, which take more than SGLang has expected of them, can have
    taken it since. The others are asked again before the next step. Nothing is changed.

    Args:
        due: Places of requests in the batch, by which the result has them too.
        configs: Their settings.
    """
    allocator: Any = parts.scheduler.token_to_kv_pool_allocator
    room = allocator.available_size() + parts.scheduler.tree_cache.evictable_size()
    jobs = {}
    for place, config in zip(due, configs, strict=True):
        req = batch.reqs[place]
        state = state_of(req)
        assert config is not None, "a request without a policy is never due"
        refuse_odd_lengths(req, state)
        plan = PromptPlan(state.prompt_len, req.kv.kv_allocated_len, kept_of_prompt(config, state.prompt_len))
        needed = ceil_to_page(plan.kept_len, allocator.page_size)
        if needed <= room:
            jobs[place] = Job(req=req, state=state, config=config, plan=plan)
            room -= needed
    return jobs


def compact(parts: Parts, policy: Policy, window: int, batch: ScheduleBatch, jobs: Sequence[Job[PromptPlan]]) -> None:
    """Copy what these requests of a batch keep into slots of their own, and let go of those they had.

    All of them choose in the way of the server: per layer and head, or in blocks.

    Mutates new slots of the pool, ``req_to_token``, the allocator, the tree's locks and who owns what of the rows; no
    length of a request yet. Rows are rewritten on the scheduler's stream, which SGLang has made wait until the forward
    pass in flight has read what it needs of them, as in ``drop.compact``.
    """
    scheduler = parts.scheduler
    # All before anything is unlocked: what is evicted for them is not of these requests.
    new_slots = [alloc_slots(scheduler, None, job.plan.kept_len) for job in jobs]
    copy = copy_heads if jobs[0].config.granularity == HEAD else copy_blocks
    copy(parts, policy, window, batch, jobs, new_slots)
    allocator: Any = scheduler.token_to_kv_pool_allocator
    tree_cache: Any = scheduler.tree_cache
    allocator.free_group_begin()
    for job in jobs:
        kv = job.req.kv
        tree_cache.free_kv_row(kv, [(kv.cache_protected_len, job.plan.resident_len)])
    # The group holds views of the rows, so it ends before they are rewritten.
    allocator.free_group_end()
    for job, slots in zip(jobs, new_slots, strict=True):
        req: Any = job.req
        batch.req_to_token_pool.write((req.kv.req_pool_idx, slice(0, len(slots))), slots.to(torch.int32))
        tree_cache.unlock(req.lock)
        req.lock = req.last_node = None
        req.kv.cache_protected_len = 0
