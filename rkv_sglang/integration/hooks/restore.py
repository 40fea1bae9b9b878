"""Hooks in the life of a preempted request, in its order.

It is copied before its slots go, waits as what it will hold, and is put back when it is admitted again, or computed
again like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import (
    ALLOCATOR,
    BATCH,
    FORWARD_BATCH,
    KV_POOL,
    MANAGERS,
    MEM_CACHE,
    PENALTIES,
    REPORTER,
    REQ,
    REQ_KV,
    ROWS,
    SCHEDULER,
    TREE,
    WEIGHTS,
)
from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.penalties import count_earlier_tokens, count_next_tokens
from rkv_sglang.integration.runtime.prefixes.named import made_by, used_by
from rkv_sglang.integration.runtime.prefixes.reading import drop_prefixes, end_without_prefix
from rkv_sglang.integration.runtime.prefixes.room import refuse_without_room
from rkv_sglang.integration.runtime.requests import prompt_len_of, state_of
from rkv_sglang.integration.runtime.restore import (
    EVICTED_ATTRIBUTE,
    drop_host_copies,
    end_if_hopeless,
    forget_what_was_cached,
    host_copy_of,
    logical_lens_of,
    restore_waiting,
    save_if_too_long,
    use_resident_ids,
)
from rkv_sglang.kernels.transfer import sent


def copy_before_release(*, req: Any, **kwargs: Any) -> None:
    """Copy a compacted request's KV to the host, if it is about to lose it and could not be computed again."""
    save_if_too_long(req)


def after_retract(_: None, req: Any) -> None:
    """Reset the policy's view of a retracted request."""
    forget_what_was_cached(req)
    use_resident_ids(req)


def end_if_too_long(enqueue: Callable[..., None], scheduler: Any, req: Any, is_retracted: bool = False) -> None:
    """End or refuse what would wait for ever: a retracted request that can neither be computed again nor restored, one
    whose named prefix is gone, and a new one that needs what named prefixes hold.
    """
    parts = get_runtime().parts
    refuse_without_room(parts, req)
    if not end_without_prefix(parts, req) and not end_if_hopeless(req):
        enqueue(scheduler, req, is_retracted)


def match_prompt_only(compute: Callable[..., int], req: Any, input_len: int) -> int:
    """Keep a request that is prefilled with tokens it generated from taking tree-owned slots for them."""
    max_prefix_len = compute(req, input_len)
    if (made := made_by(req)) is not None:
        # The task is computed, so that its queries are seen.
        return min(max_prefix_len, made.length)
    prompt_len = prompt_len_of(req)
    if (len(req.output_ids) > 0 or prompt_len < len(req.origin_input_ids)) and get_runtime().may_compact(req):
        # A copy that lacks some of its prompt has no place for what the tree has of it.
        is_prompt_compacted = host_copy_of(req) is not None and state_of(req).evicted_prompt_tokens > 0
        return 0 if is_prompt_compacted else min(max_prefix_len, prompt_len)
    return max_prefix_len


def keep_resident_ids(refresh: Callable[[Any], None], req: Any) -> None:
    """Leave the list of a request that waits to be restored as ``use_resident_ids`` made it."""
    if host_copy_of(req) is None:
        refresh(req)


def restore_before_extend(prepare: Callable[[Any], None], batch: Any) -> None:
    """Put back the KV of requests that wait to be restored, then let SGLang prefill the rest, of each its last token.

    Afterwards ``batch.orig_seq_lens`` counts evicted tokens too, as it does for all compacted requests, and all of the
    document of a named prefix; and penalties those generated before, of requests that are computed again, too.
    """
    is_any_restored = restore_waiting(batch)
    prepare(batch)
    count_earlier_tokens(batch)
    if is_any_restored or any(used_by(req) is not None for req in batch.reqs):
        logical = logical_lens_of(batch, batch.orig_seq_lens.dtype)
        batch.orig_seq_lens = sent(logical, batch.orig_seq_lens.device)


def count_tokens_in_turn(batch: Any) -> None:
    """Count each request's tokens for its penalties one by one, whatever was scheduled in between."""
    count_next_tokens(batch)


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


def drop_copies_of(why: str) -> None:
    """Drop the copies on the host and the named prefixes, because of what happened to the cache; ``why`` says that."""
    runtime = get_runtime()
    if runtime.is_bound:
        drop_host_copies(runtime.parts.scheduler, f"{why} before its compressed KV was put back")
        drop_prefixes(runtime.parts)


def drop_after_flush(is_flushed: bool, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Flush the copies on the host, and forget the named prefixes, together with the cache."""
    if is_flushed:
        drop_copies_of("the cache was flushed")


def drop_old_weights(manager: Any, *args: Any, **kwargs: Any) -> None:
    """Drop KV of weights that are replaced now, or may have been since the last look."""
    drop_copies_of("the weights changed")


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
            *names(SCHEDULER, "max_total_num_tokens req_to_token_pool token_to_kv_pool_allocator"),
            *names(SCHEDULER, "attn_tp_cpu_group attn_tp_group"),
            "sglang.srt.distributed.parallel_state.GroupCoordinator.world_size",
            *names(REQ, "finished input_embeds kv origin_input_ids output_ids rid"),
            *names(REQ_KV, "kv_allocated_len req_pool_idx"),
            f"{ALLOCATOR}.get_kvcache",
            *names(KV_POOL, "k_buffer v_buffer"),
            f"{ROWS}.req_to_token",
        ),
        surroundings=names(BATCH, "check_decode_mem release_req retract_decode"),
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.Req.reset_for_retract",
        kind="AFTER",
        function=after_retract,
        signature="(self)",
        why="Lengths restart with the new prefill, and recomputed KV of generated tokens must stay out of the tree.",
        upstream="A `kv_policy.on_retract(req)` call in reset_for_retract.",
        uses=(*names(REQ, "full_untruncated_fill_ids origin_input_ids output_ids skip_radix_cache_insert"),),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        kind="AROUND",
        function=end_if_too_long,
        signature="(self, req, is_retracted=False)",
        why="A preempted request with a history longer than the pool would wait for ever to be prefilled again.",
        upstream="Retraction keeps a host copy of the compacted KV.",
        uses=(
            *names(SCHEDULER, "_release_aborted_request max_total_num_tokens output_streamer"),
            *names(REQ, "finished finished_reason origin_input_ids output_ids to_finish"),
            f"{MANAGERS}.schedule_batch.FINISH_ABORT",
        ),
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len",
        kind="AROUND",
        function=match_prompt_only,
        signature="(self, input_len)",
        capability="sharing",
        why=(
            "A retracted request matches prompt plus outputs against the tree; if a finished twin inserted them, "
            "compaction would write slots that other requests share."
        ),
        upstream="A per-request limit on how much of its history may be shared.",
        uses=(*names(REQ, "origin_input_ids output_ids"),),
        surroundings=(f"{REQ}.init_next_round_input",),
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
            f"{BATCH}.sampling_info",
            "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.penalizer_orchestrator",
            *names(f"{PENALTIES}.BatchedPenalizerOrchestrator", "is_required penalizers"),
            *names(f"{PENALTIES}.BatchedFrequencyPenalizer", "cumulated_frequency_penalties frequency_penalties"),
            *names(f"{PENALTIES}.BatchedMinNewTokensPenalizer", "is_prepared len_output_tokens"),
            *names(f"{PENALTIES}.BatchedPresencePenalizer", "cumulated_presence_penalties presence_penalties"),
            *names(f"{PENALTIES}.BatchedRepetitionPenalizer", "cumulated_repetition_penalties repetition_penalties"),
        ),
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
        kind="REPLACE",
        function=count_tokens_in_turn,
        signature="(self)",
        why=(
            "Under overlap scheduling a prefill between two decode steps, such as one that restores a request, leaves "
            "a token of each request out of its penalties and counts another twice."
        ),
        upstream="Penalties count the token that follows the last one counted, not the last one known.",
        uses=(
            *names(BATCH, "device enable_overlap reqs sampling_info"),
            *names(REQ, "beam_group kv origin_input_ids output_ids"),
            f"{REQ_KV}.kv_allocated_len",
            f"{PENALTIES}.BatchedPenalizerOrchestrator.cumulate_output_tokens",
        ),
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.sample",
        kind="AROUND",
        function=sample_at_logical_positions,
        signature="(self, logits_output, forward_batch)",
        capability="positions",
        why="A seeded sample after a prefill depends on seq_lens, which counts resident tokens once it was compacted.",
        upstream="Samples after a prefill depend on positions, as those of decode steps do.",
        uses=(f"{FORWARD_BATCH}.seq_lens",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.flush_cache",
        kind="AFTER",
        function=drop_after_flush,
        signature="(self, empty_cache=True)",
        capability="invalidation",
        why="After a flush, as with new weights, the old KV must not come back in a restored request.",
        upstream="A `kv_policy.flush()` call in flush_cache.",
        uses=(f"{SCHEDULER}.waiting_queue", f"{TREE}.protected_size"),
    ),
    Hook(
        target=f"{WEIGHTS}._observe_weight_load",
        kind="BEFORE",
        function=drop_old_weights,
        signature="(self, source)",
        capability="invalidation",
        why="New weights that SGLang loads pass here; KV of the old ones must not come back in a restored request.",
        upstream="The same call before weights are loaded.",
    ),
    Hook(
        target=f"{WEIGHTS}.begin_weight_update",
        kind="BEFORE",
        function=drop_old_weights,
        signature="(self, recv_req)",
        why="Weights that a trainer writes into the server's memory by itself are announced here, and loaded nowhere.",
        upstream="The same call when weights begin to change.",
    ),
    Hook(
        target=f"{WEIGHTS}.end_weight_update",
        kind="BEFORE",
        function=drop_old_weights,
        signature="(self, recv_req)",
        why="A request may be preempted, and its KV copied, while a trainer writes weights into the server's memory.",
        upstream="The same call when weights have changed.",
    ),
)
