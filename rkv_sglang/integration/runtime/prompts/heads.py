"""The choice of what stays of prompts per layer and KV head, and its copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rkv_sglang.cache.prompt import compact_prompts
from rkv_sglang.integration.runtime.jobs import Job, scoring
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.startup.verify_switch import is_verifying
from rkv_sglang.policies import Policy
from rkv_sglang.sizes.prompt_plan import PromptPlan

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


def copy_heads(
    parts: Parts,
    policy: Policy,
    window: int,
    batch: ScheduleBatch,
    jobs: Sequence[Job[PromptPlan]],
    new_slots: Sequence[torch.Tensor],
) -> None:
    """Copy what every layer and head keeps of these requests into new slots, on the stream of forward passes.

    Mutates the pool in ``new_slots`` alone.

    Args:
        new_slots: Of each request ``[plan.kept_len]``, int64.
    """
    scored, scheduler = parts.scored, parts.scheduler
    assert scored is not None, "what every head keeps is chosen by scores"
    with scoring(parts, scored, batch, jobs, of_prompts=True) as due:
        if due.stream is not None:
            for slots in new_slots:
                if slots.is_cuda:
                    slots.record_stream(due.stream)
        kept = compacting(scheduler.tree_cache)(
            scored.buffers,
            due.requests,
            new_slots,
            due.read_queries,
            policy,
            window,
            query_bytes=scored.request_bytes,
            model=scored.attention,
        )
        for job, indices in zip(jobs, kept, strict=True):
            if indices is not None:
                job.record_prompt_trace(indices)


def compacting(tree_cache: Any) -> Callable[..., list[torch.Tensor | None]]:
    """Return what compacts, with all that it does checked if a server was started so, the radix tree's slots too."""
    if not is_verifying():
        return compact_prompts
    # Here, so that other servers do not load it.
    from rkv_sglang.cache.verify.prompt import compact_prompts_and_verify

    return partial(compact_prompts_and_verify, compact_prompts, tree_cache.all_values_flatten().long())
