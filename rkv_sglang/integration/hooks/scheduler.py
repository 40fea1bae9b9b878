"""Hooks on the scheduler's side: when to compact, and what the server reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkv_sglang.config import POLICY_FIELD
from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import (
    ALLOCATOR,
    BATCH,
    FORWARD_BATCH,
    FORWARD_MODE,
    MANAGERS,
    MEM_CACHE,
    REQ,
    REQ_KV,
    ROWS,
    SCHEDULER,
    TREE,
)
from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.prefixes.making import make_prefixes


def before_admission(scheduler: Any, prefill_delayer_single_pass: Any, running_batch: Any) -> None:
    """Compact before waiting requests are admitted, so that they see the freed slots in the same step."""
    get_runtime().before_decode(running_batch)


def before_decode_step(scheduler: Any, batch: Any) -> None:
    """Compact before a decode step whose scheduling skipped admission."""
    get_runtime().before_decode(batch)


def before_result(scheduler: Any, batch: Any, result: Any) -> None:
    """Make the named prefixes of requests that were prefilled, while these have their slots."""
    runtime = get_runtime()
    if runtime.parts.prefixes.in_making:
        make_prefixes(runtime.parts, runtime.policy, batch)


def keep_decode_steps(vote: Callable[..., bool], *, local_batch: Any, **kwargs: Any) -> bool:
    """Vote against a step in which decoding requests would run as a prefill, because another rank has one."""
    if local_batch is not None and local_batch.forward_mode.is_decode():
        return False
    return vote(local_batch=local_batch, **kwargs)


def add_policy_stats(result: Any, scheduler: Any, recv_req: Any) -> None:
    """Add the policy's counters and settings to the server info."""
    result.internal_state["kv_policy_stats"] = get_runtime().report()


def report_policy(result: dict[str, Any], scheduler: Any) -> None:
    """Tell the launcher that this scheduler runs the policy."""
    result[POLICY_FIELD] = get_runtime().config.policy


SCHEDULER_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw",
        kind="BEFORE",
        function=before_admission,
        signature="(self, prefill_delayer_single_pass, running_batch)",
        capability="schedule",
        why="Compaction belongs after finished requests left the batch and before admission counts free slots.",
        upstream="A call `self.kv_policy.before_decode(running_batch)` after the merge in get_next_batch_to_run.",
        uses=(
            *names(SCHEDULER, "enable_overlap forward_ct forward_stream forward_stream_ctx schedule_stream"),
            *names(SCHEDULER, "attn_tp_group token_to_kv_pool_allocator tree_cache"),
            *names("sglang.srt.distributed.parallel_state.GroupCoordinator", "device_group world_size"),
            *names(BATCH, "batch_is_full req_to_token_pool reqs seq_lens seq_lens_cpu seq_lens_sum"),
            *names(REQ, "decode_batch_idx finished kv last_node lock multimodal_inputs rid skip_radix_cache_insert"),
            *names(REQ_KV, "cache_protected_len holds_kv kv_allocated_len kv_committed_len req_pool_idx"),
            f"{ROWS}.req_to_token",
            *names(ALLOCATOR, "available_size free_group_begin free_group_end free_page_ids page_size"),
            *names(TREE, "all_values_flatten evictable_size free_kv_row unlock"),
        ),
        surroundings=(
            *names(SCHEDULER, "event_loop_normal event_loop_overlap get_new_batch_prefill get_next_batch_to_run"),
            *names(SCHEDULER, "process_batch_result run_batch"),
            *names(BATCH, "filter_batch merge_batch prepare_for_decode"),
            f"{MEM_CACHE}.common.release_kv_cache",
        ),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.update_running_batch",
        kind="BEFORE",
        function=before_decode_step,
        signature="(self, batch)",
        capability="schedule",
        why="Some steps skip admission (deferred prefill), and a due request must not outgrow its capacity there.",
        upstream="The same call as for admission.",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        kind="BEFORE",
        function=before_result,
        signature="(self, batch, result)",
        why="A request that makes a named prefix may end with its first token, and then its slots are not its own.",
        upstream="A call of the KV policy between a prefill and the processing of its result.",
        uses=(
            f"{BATCH}.forward_mode",
            f"{FORWARD_MODE}.is_extend",
            *names(REQ, "finished inflight_middle_chunks is_retracted origin_input_ids to_finish"),
            f"{MEM_CACHE}.base_prefix_cache.InsertParams",
            f"{MEM_CACHE}.base_prefix_cache.InsertResult.last_device_node",
            f"{MEM_CACHE}.radix_cache.RadixKey",
            *names(TREE, "insert lock unlock"),
            f"{MANAGERS}.schedule_batch.FINISH_ABORT",
        ),
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.dp_attn._local_prefill_cuda_graph_vote",
        kind="AROUND",
        function=keep_decode_steps,
        signature=(
            "(*, local_batch, num_tokens, prefill_graph_runner, coordinated_prefill, breakable_prefill, "
            "spec_algorithm, model_config)"
        ),
        why=(
            "With data-parallel attention a rank's decode step may run as a prefill of one token each, so that all "
            "ranks run one graph: its queries would not be recorded, and it would count as no decode step. The vote "
            "of one rank decides for all."
        ),
        upstream="A KV policy has a say in which batches may be run as another kind.",
        uses=(
            f"{BATCH}.forward_mode",
            f"{FORWARD_MODE}.is_decode",
        ),
        surroundings=(
            "sglang.srt.managers.scheduler_components.dp_attn.prepare_mlp_sync_batch_raw",
            "sglang.srt.managers.scheduler_components.dp_attn.SchedulerDPAttnAdapter.maybe_convert_decode_to_extend",
            f"{FORWARD_BATCH}.prepare_mlp_sync_batch",
        ),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        kind="AFTER",
        function=add_policy_stats,
        signature="(self, recv_req)",
        capability="reports",
        why="Users see in /server_info how often the server compacted.",
        upstream="A place for plugins to add to the internal state.",
        uses=("sglang.srt.managers.io_struct.GetInternalStateReqOutput.internal_state",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_init_info",
        kind="AFTER",
        function=report_policy,
        signature="(self)",
        why="The launcher refuses to serve unless every scheduler says that the policy is on.",
        upstream="The scheduler's ready message carries its resolved policy.",
    ),
)
