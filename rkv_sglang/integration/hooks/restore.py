"""Hooks in the life of a preempted request: copied before its slots go, put back when it is admitted again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import (
    ALLOCATOR,
    BATCH,
    FORWARD_BATCH,
    KV_POOL,
    MEM_CACHE,
    REPORTER,
    REQ,
    REQ_KV,
    ROWS,
    SCHEDULER,
    TREE,
)
from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.restore import (
    EVICTED_ATTRIBUTE,
    drop_host_copies,
    evicted_tokens_of,
    host_copy_of,
    restore_waiting,
    save_if_too_long,
)


def copy_before_release(*, req: Any, **kwargs: Any) -> None:
    """Copy a compacted request's KV to the host, if it is about to lose it and could not be computed again."""
    save_if_too_long(req)


def keep_resident_ids(refresh: Callable[[Any], None], req: Any) -> None:
    """Leave the list of a request that waits to be restored as ``use_resident_ids`` made it."""
    if host_copy_of(req) is None:
        refresh(req)


def restore_before_extend(prepare: Callable[[Any], None], batch: Any) -> None:
    """Put back the KV of requests that wait to be restored, then let SGLang prefill the rest, of each its last token.

    Afterwards ``batch.orig_seq_lens`` counts evicted tokens too, as it does for all compacted requests.
    """
    is_any_restored = restore_waiting(batch)
    prepare(batch)
    if is_any_restored:
        evicted = evicted_tokens_of(batch, batch.orig_seq_lens.dtype)
        batch.orig_seq_lens = batch.orig_seq_lens + evicted.to(batch.orig_seq_lens.device, non_blocking=True)


def sample_at_logical_positions(sample: Callable[..., Any], runner: Any, logits_output: Any, forward_batch: Any) -> Any:
    """Let a seeded restored request draw the number that belongs to its position."""
    evicted = getattr(forward_batch, EVICTED_ATTRIBUTE, None)
    if evicted is None:
        return sample(runner, logits_output, forward_batch)
    seq_lens = forward_batch.seq_lens
    forward_batch.seq_lens = seq_lens + evicted.to(seq_lens)
    try:
        return sample(runner, logits_output, forward_batch)
    finally:
        forward_batch.seq_lens = seq_lens


def drop_after_flush(is_flushed: bool, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Flush the copies on the host together with the cache."""
    if is_flushed:
        drop_host_copies(scheduler, "the cache was flushed before its compressed KV was put back")


def drop_before_weights(manager: Any, source: str) -> None:
    """Drop KV of the old weights."""
    runtime = get_runtime()
    if runtime.is_bound:
        drop_host_copies(runtime.parts.scheduler, "the weights changed before its compressed KV was put back")


RESTORE_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.schedule_batch.release_req",
        kind="BEFORE",
        function=copy_before_release,
        signature=(
            "(*, req, remaing_req_count, req_to_token_pool, token_to_kv_pool_allocator, tree_cache, "
            "hisparse_coordinator, offload_kv=True)"
        ),
        why="A preempted request loses its compacted KV, and what is longer than the pool cannot be computed again.",
        upstream="Retraction asks the KV policy whether to keep a host copy.",
        uses=(
            *names(SCHEDULER, "max_total_num_tokens req_to_token_pool token_to_kv_pool_allocator tp_cpu_group tp_size"),
            *names(REQ, "finished input_embeds kv origin_input_ids output_ids rid"),
            *names(REQ_KV, "kv_allocated_len req_pool_idx"),
            f"{ALLOCATOR}.get_kvcache",
            *names(KV_POOL, "k_buffer v_buffer"),
            f"{ROWS}.req_to_token",
        ),
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.Req.refresh_fill_ids",
        kind="AROUND",
        function=keep_resident_ids,
        signature="(self)",
        why="Admission counts a waiting request by every token it has seen, and it comes back with those it kept.",
        upstream="The KV policy tells how many tokens a waiting request will hold.",
        uses=(f"{REQ}.full_untruncated_fill_ids",),
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
        kind="AROUND",
        function=restore_before_extend,
        signature="(self)",
        why="A request with a host copy needs slots with that KV in them before its last token is computed.",
        upstream="prepare_for_extend restores requests that were retracted with a host copy, as decode instances do.",
        uses=(
            *names(MEM_CACHE + ".allocation", "alloc_paged_token_slots_extend alloc_req_slots alloc_token_slots"),
            *names(BATCH, "device orig_seq_lens req_to_token_pool reqs seq_lens tree_cache"),
            *names(REQ, "extend_end kv output_ids prefix_len rid"),
            *names(REQ_KV, "cache_protected_len kv_allocated_len kv_committed_len req_pool_idx"),
            *names(TREE, "page_size prefix_device_indices"),
            f"{ROWS}.write",
            f"{SCHEDULER}.metrics_reporter",
            f"{REPORTER}.is_stats_logging_rank",
        ),
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.sample",
        kind="AROUND",
        function=sample_at_logical_positions,
        signature="(self, logits_output, forward_batch)",
        why="A seeded sample after a prefill depends on seq_lens, which counts resident tokens once it was compacted.",
        upstream="Samples after a prefill depend on positions, as those of decode steps do.",
        uses=(f"{FORWARD_BATCH}.seq_lens",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.flush_cache",
        kind="AFTER",
        function=drop_after_flush,
        signature="(self, empty_cache=True)",
        why="After a flush, as with new weights, the old KV must not come back in a restored request.",
        upstream="A `kv_policy.flush()` call in flush_cache.",
        uses=(f"{SCHEDULER}.waiting_queue",),
    ),
    Hook(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager._observe_weight_load"
        ),
        kind="BEFORE",
        function=drop_before_weights,
        signature="(self, source)",
        why="All ways to load new weights pass here; KV of the old ones must not come back in a restored request.",
        upstream="The same call before weights are loaded.",
    ),
)
