"""The choice of what stays of prompts once for a whole request, in blocks, and its copy, whatever the pool holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rkv_sglang.cache.block_choice import BlockChoice, kept_tokens
from rkv_sglang.cache.prompt import copy_slots
from rkv_sglang.cache.step_tensors import read_slots
from rkv_sglang.integration.runtime.drop import sum_over_ranks, ways_of
from rkv_sglang.integration.runtime.jobs import Job, on_forward_stream, scoring
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.prompts.slots import sides_of
from rkv_sglang.integration.startup.verify_switch import is_verifying
from rkv_sglang.kernels.transfer import sent
from rkv_sglang.policies import Policy
from rkv_sglang.sizes.compaction_plan import DropPlan
from rkv_sglang.sizes.prompt_plan import PromptPlan

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


def copy_blocks(
    parts: Parts,
    policy: Policy,
    window: int,
    batch: ScheduleBatch,
    jobs: Sequence[Job[PromptPlan]],
    new_slots: Sequence[torch.Tensor],
) -> None:
    """Copy what all layers and heads keep of these requests into new slots; arguments as in ``copy_heads``."""
    ways = ways_of(parts.scheduler.tree_cache)
    of_blocks = [
        Job(req=job.req, state=job.state, config=job.config, plan=job.plan.of_blocks(window, job.config.block))
        for job in jobs
    ]
    if parts.scored is None:
        choices = ways.choose_by_place([(job.plan, job.logical_len, None) for job in of_blocks], policy, window)
        rows = [job.req.kv.req_pool_idx for job in jobs]
        slots = read_slots(batch.req_to_token_pool.req_to_token, rows, [job.plan.resident_len for job in jobs])
        with on_forward_stream(parts.scheduler) as stream, parts.timed():
            _copy(parts, of_blocks, choices, slots, new_slots, stream)
        return
    with scoring(parts, parts.scored, batch, of_blocks, of_prompts=True) as due:
        choices = ways.choose_by_scores(
            parts.scored.buffers,
            due.requests,
            due.read_queries,
            policy,
            window,
            query_bytes=parts.scored.request_bytes,
            model=parts.scored.attention,
            sum_over_ranks=sum_over_ranks(parts.scheduler),
        )
        _copy(parts, of_blocks, choices, [request.slots for request in due.requests], new_slots, due.stream)


def _copy(
    parts: Parts,
    jobs: Sequence[Job[DropPlan]],
    choices: Sequence[BlockChoice],
    slots: Sequence[torch.Tensor],
    new_slots: Sequence[torch.Tensor],
    stream: Any,
) -> None:
    """Copy what stays, on the current stream; record it for those who asked."""
    # All of them are views of one tensor.
    tensors = [slots[0], *new_slots]
    for tensor in tensors if stream is not None else ():
        if tensor.is_cuda:
            tensor.record_stream(stream)
    copy = copying(parts)
    for job, choice, own, new in zip(jobs, choices, slots, new_slots, strict=True):
        kept = sent(kept_tokens(job.plan, choice), own.device)
        copy(own[kept], new)
        if job.wants_trace:
            job.record_prompt_trace(kept[: job.state.prompt_len - job.plan.evicted_tokens][None, None])


def copying(parts: Parts) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return what copies the KV of slots into others, of all layers, on the current stream.

    With what it does checked if a server was started so, the radix tree's slots too.
    """
    pool: Any = parts.scheduler.token_to_kv_pool_allocator.get_kvcache()
    layers = [layer for side in sides_of(pool) for layer in side]
    if not is_verifying():
        return partial(copy_slots, layers)
    # Here, so that other servers do not load it.
    from rkv_sglang.cache.verify.prompt import copy_slots_and_verify

    tree_cache: Any = parts.scheduler.tree_cache
    return partial(copy_slots_and_verify, copy_slots, tree_cache.all_values_flatten().long(), layers)
