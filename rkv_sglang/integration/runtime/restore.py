"""Restore of a preempted request that is too long to be computed again, from a host copy of its compacted KV.

The KV is copied before its slots are freed; the request waits in SGLang's queue as one of its resident length, and is
put back right before the prefill that SGLang would give it: only the last output token is then left to compute.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import torch

from rkv_sglang.cache.host_copy import HostCopy, load_slots, save_slots
from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.prefixes.named import gap_of
from rkv_sglang.integration.runtime.prompts.pending import budget_after_prefill
from rkv_sglang.integration.runtime.prompts.slots import alloc_slots, sides_of
from rkv_sglang.integration.runtime.requests import (
    end_request,
    known_state_of,
    num_carried_tokens,
    state_of,
    trace_of,
)
from rkv_sglang.integration.runtime.runtime import Runtime
from rkv_sglang.kernels.transfer import sent
from rkv_sglang.sizes.reservation import most_growth, tokens_to_reserve

logger = logging.getLogger(__name__)

# Of a forward batch: the tokens evicted of each of its requests, where any were.
EVICTED_ATTRIBUTE = "rkv_evicted"


def host_copy_of(req: Any) -> HostCopy | None:
    """Return the KV from which a waiting request will be restored; None for all others."""
    state = known_state_of(req)
    return None if state is None else state.host_copy


def len_after_prefill(req: Any) -> int:
    """Return how many tokens a waiting request holds once it is prefilled or restored."""
    copy = host_copy_of(req)
    # The last output is computed, whatever else is.
    return len(req.origin_input_ids) + len(req.output_ids) if copy is None else copy.num_tokens + 1


def growth_after_prefill(req: Any, resident_len: int, *, is_restored: bool, pool_size: int | None = None) -> int:
    """Return by how many tokens a request with a policy can grow after a prefill that leaves it ``resident_len``.

    Args:
        is_restored: It comes back with what it kept, of its prompt too, instead of being computed (again).
        pool_size: As for ``budget_after_prefill``.
    """
    runtime, state = get_runtime(), state_of(req)
    config = runtime.config_of(req)
    assert config is not None, "only requests with a policy have a bound"
    prompt_len = state.held_prompt_len if is_restored else state.prompt_len
    return tokens_to_reserve(
        config,
        output_len=len(req.output_ids),
        max_new_tokens=req.sampling_params.max_new_tokens,
        held_len=resident_len - prompt_len,
        prompt_len=prompt_len,
        prompt_budget=0 if is_restored else budget_after_prefill(runtime.parts, config, req, resident_len, pool_size),
        page_size=runtime.page_size,
    )


def can_be_admitted(req: Any, resident_len: int, *, is_restored: bool) -> bool:
    """Return whether a request that holds so many tokens after its prefill ever fits the pool."""
    pool_size = get_runtime().parts.pool_size_for(req)
    growth = growth_after_prefill(req, resident_len, is_restored=is_restored, pool_size=pool_size)
    return growth <= most_growth(resident_len, pool_size)


def save_if_too_long(req: Any) -> None:
    """Copy a compacted request's KV to the host, if it is about to lose it and could not be computed again.

    Without a copy (the host has no memory for it, or the request would not fit the pool even so) it is ended when it
    is queued again.
    """
    runtime = get_runtime()
    state = known_state_of(req)
    if state is None or state.evicted_tokens == 0 or req.finished() or req.input_embeds is not None:
        return
    num_seen = len(req.origin_input_ids) + len(req.output_ids)
    # The last output is fed again, so what it left in the cache is not copied; nor is what Req.reset_for_retract
    # forgets with a token in flight. Both are at the end: the most recent tokens are never evicted.
    num_cached = state.logical_len(req.kv.kv_allocated_len) - state.prefix_gap
    num_dropped = num_cached - (num_seen - 1)
    saved_len = req.kv.kv_allocated_len - num_dropped
    if num_dropped not in (0, 1):
        raise RuntimeError(
            f"request {req.rid}: {num_cached} tokens are cached and {num_seen} were "
            "seen; please report this with the server's flags"
        )
    if can_be_admitted(req, num_seen, is_restored=False):
        return
    if not can_be_admitted(req, saved_len + 1, is_restored=True):
        return
    state.host_copy = _save(runtime, req, saved_len)
    # Else a request that ends while it waits would be kept, with its copy, until its row is needed.
    runtime.forget_queries(req)


def _save(runtime: Runtime, req: Any, saved_len: int) -> HostCopy | None:
    scheduler = runtime.parts.scheduler
    slots = scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :saved_len].to(torch.int64)
    pool: Any = scheduler.token_to_kv_pool_allocator.get_kvcache()
    with runtime.on_forward_stream() as stream:
        if stream is not None and slots.is_cuda:
            slots.record_stream(stream)
        copy = save_slots(*sides_of(pool), slots)
    if scheduler.attn_tp_group.world_size > 1:
        # Ranks that have heads of this request must agree on whether it goes on; others know nothing of it.
        is_saved = torch.tensor(int(copy is not None))
        torch.distributed.all_reduce(is_saved, torch.distributed.ReduceOp.MIN, group=scheduler.attn_tp_cpu_group)
        copy = copy if is_saved.item() else None
    if copy is None:
        logger.warning("No memory is left for a copy of the %d cached tokens of request %s.", saved_len, req.rid)
    return copy


def forget_what_was_cached(req: Any) -> None:
    """Forget what a retracted request had cached, unless it comes back; keep generated tokens out of the tree.

    Their KV, computed again, would be shared, and compaction writes there. SGLang lets the whole answer go where the
    prompt came as embeddings; then nothing of it counts any more.
    """
    state = state_of(req)
    if len(req.output_ids) == 0:
        state.forget_answer()
        if (trace := trace_of(req)) is not None:
            trace.clear()
    elif state.host_copy is None:
        state.forget_cache()
    state.next_check = 0
    if (len(req.output_ids) > 0 or num_carried_tokens(req) > 0) and get_runtime().may_compact(req):
        req.skip_radix_cache_insert = True


def use_resident_ids(req: Any) -> None:
    """Let SGLang see a retracted request as long as it will be when it is prefilled or restored.

    A restored request's list stands for its resident tokens. Of those only the prompt is ever looked up, unless it was
    compacted, and only the last is computed on.
    """
    copy = host_copy_of(req)
    ids = req.origin_input_ids + req.output_ids
    if copy is not None:
        prompt_len = state_of(req).held_prompt_len
        ids = ids[:prompt_len] + ids[prompt_len - copy.num_tokens - 1 :]
    req.full_untruncated_fill_ids = ids


def restore_waiting(batch: Any) -> bool:
    """Put back the KV of those requests of a prefill batch that wait to be restored; return whether there were any.

    SGLang then prefills the rest, of each its last token.
    """
    waiting = [req for req in batch.reqs if host_copy_of(req) is not None]
    for req in waiting:
        _restore(get_runtime(), batch, req)
    return bool(waiting)


def evicted_tokens_of(batch: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return the tokens evicted of each request since its last prefill, ``[bs]``, on the CPU.

    What a named prefix lacks of its document counts among them.
    """
    states = [known_state_of(req) for req in batch.reqs]
    evicted = [0 if state is None else state.evicted_tokens for state in states]
    evicted = [number + gap_of(req) for number, req in zip(evicted, batch.reqs, strict=True)]
    return torch.tensor(evicted, dtype=dtype, pin_memory=batch.seq_lens.is_cuda)


def logical_lens_of(batch: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return every token seen of each request of a prefill batch, after it, ``[bs]``, on the CPU.

    SGLang takes a request's prompt to be held whole, so it has no fewer than that.
    """
    evicted = evicted_tokens_of(batch, dtype)
    lens = [
        req.extend_end if gone > 0 else max(req.extend_end, len(req.origin_input_ids))
        for req, gone in zip(batch.reqs, evicted.tolist(), strict=True)
    ]
    logical = torch.tensor(lens, dtype=dtype) + evicted
    return logical.pin_memory() if batch.seq_lens.is_cuda else logical


def _restore(runtime: Runtime, batch: Any, req: Any) -> None:
    """Make a request look as if an earlier chunk of its prefill had computed all but its last token.

    Takes a row of ``req_to_token`` and slots of the pool. Where the tree has part of the prompt, that is shared again.
    """
    scheduler, state, kv = runtime.parts.scheduler, state_of(req), req.kv
    copy: HostCopy = state.host_copy
    matched_len, saved_len = req.prefix_len, copy.num_tokens
    if req.extend_end != saved_len + 1 or not matched_len == kv.cache_protected_len <= state.prompt_len:
        raise RuntimeError(
            f"request {req.rid}: {saved_len} tokens were saved, {matched_len} of them are in the tree, and SGLang "
            f"prefills up to {req.extend_end}; please report this with the server's flags"
        )
    from sglang.srt.mem_cache.allocation import alloc_req_slots

    # What of the prompt is in the tree is locked since admission.
    shared = batch.tree_cache.prefix_device_indices(req) if matched_len > 0 else None
    alloc_req_slots(batch.req_to_token_pool, [req], batch.tree_cache)
    own = alloc_slots(scheduler, shared, saved_len)
    row = own if shared is None else torch.cat([shared, own])
    batch.req_to_token_pool.write((kv.req_pool_idx, slice(0, saved_len)), row.to(torch.int32))
    pool: Any = scheduler.token_to_kv_pool_allocator.get_kvcache()
    with runtime.on_forward_stream() as stream:
        if stream is not None and own.is_cuda:
            own.record_stream(stream)
        load_slots(copy, *sides_of(pool), own, first=matched_len)
    req.prefix_len = kv.kv_allocated_len = kv.kv_committed_len = saved_len
    state.host_copy = None
    runtime.stats.requests_restored += 1
    if runtime.parts.metrics is not None:
        runtime.parts.metrics.count(runtime.stats)
    # Every rank restores it; one says so.
    if scheduler.metrics_reporter.is_stats_logging_rank:
        logger.info(
            "Restored request %s after %d tokens: KV of %d came back from the host, of %d from the prefix cache.",
            *(req.rid, len(req.output_ids), saved_len - matched_len, matched_len),
        )


def add_evicted_tokens(forward_batch: Any, batch: Any) -> None:
    """Count the positions of restored requests in a prefill batch by every token ever seen, and behind a document."""
    evicted = evicted_tokens_of(batch)
    if not evicted.any():
        return
    positions = forward_batch.positions
    offsets = evicted.repeat_interleave(torch.tensor(batch.extend_lens))
    offsets = sent(offsets.to(positions.dtype), positions.device)
    forward_batch.positions = positions + offsets
    if forward_batch.mrope_positions is not None:
        forward_batch.mrope_positions = forward_batch.mrope_positions + offsets
    setattr(forward_batch, EVICTED_ATTRIBUTE, sent(evicted, positions.device))


def end_if_hopeless(req: Any) -> bool:
    """End a retracted request that can neither be computed again nor restored; return whether it was one."""
    runtime = get_runtime()
    if runtime.config_of(req) is None or len(req.output_ids) == 0 or req.finished() or host_copy_of(req) is not None:
        return False
    if can_be_admitted(req, len(req.origin_input_ids) + len(req.output_ids), is_restored=False):
        return False
    _abort(runtime.parts.scheduler, req, "no copy of its compressed KV could be kept")
    return True


def drop_host_copies(scheduler: Any, why: str) -> None:
    """End all requests that wait to be restored: their KV no longer is what the model would compute.

    They wait for it because they are too long to be computed again.
    """
    dropped = [req for req in scheduler.waiting_queue if host_copy_of(req) is not None]
    if not dropped:
        return
    scheduler.waiting_queue = [req for req in scheduler.waiting_queue if host_copy_of(req) is None]
    for req in dropped:
        state_of(req).forget_cache()
        _abort(scheduler, req, why)


def _abort(scheduler: Any, req: Any, why: str) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    history_len = len(req.origin_input_ids) + len(req.output_ids)
    message = (
        f"The request was preempted after {len(req.output_ids)} tokens, and its history of {history_len} tokens does "
        f"not fit the KV pool of {scheduler.max_total_num_tokens} tokens to be computed again, and {why}: send it "
        "again, and give the pool more memory (--mem-fraction-static) or do not preempt requests of this length."
    )
    scheduler._release_aborted_request(req)
    end_request(scheduler, req, FINISH_ABORT(message, status_code=HTTPStatus.SERVICE_UNAVAILABLE))
    get_runtime().stats.requests_aborted += 1
