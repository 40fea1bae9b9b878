"""Hooks on what a scheduler reports of itself: the gauges of its metrics, and its decode log line."""

from __future__ import annotations

from typing import Any

from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import REPORTER, REQ, SCHEDULER
from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.requests import state_of
from rkv_sglang.integration.runtime.restore import host_copy_of, len_after_prefill
from rkv_sglang.integration.runtime.runtime import Runtime


def running_tokens(runtime: Runtime) -> tuple[int, int]:
    """Return the tokens that the running requests hold, and those they would hold without a policy."""
    resident = evicted = 0
    for req in runtime.parts.scheduler.running_batch.reqs:
        if req.kv.holds_kv and not req.finished():
            resident += req.kv.kv_allocated_len
            evicted += state_of(req).evicted_tokens + state_of(req).prefix_gap
    return resident, resident + evicted


def report_running(_: None, collector: Any, stats: Any) -> None:
    """Set the gauges whenever SGLang sets its own."""
    runtime = get_runtime()
    if runtime.is_bound and (metrics := runtime.parts.metrics) is not None:
        resident, logical = running_tokens(runtime)
        metrics.set(resident_tokens=resident, logical_tokens=logical)
        metrics.count(runtime.stats)


def add_to_decode_log(parts: list[str], pool_stats: Any) -> list[str]:
    """Say in SGLang's decode log line how many tokens the running requests hold, and of how many."""
    runtime = get_runtime()
    if not runtime.is_bound:
        return parts
    resident, logical = running_tokens(runtime)
    return [*parts, f"#resident/logical: {resident}/{logical}"]


def count_what_was_kept(loads: Any, inquirer: Any) -> None:
    """Let a request that waits to be restored weigh what it kept: a gateway would leave the server alone."""
    if not get_runtime().is_bound:
        return
    waiting = [req for req in inquirer.get_waiting_queue() if host_copy_of(req) is not None]
    dropped = sum(req.seqlen - len_after_prefill(req) for req in waiting)
    loads.num_total_tokens -= dropped
    loads.num_active_tokens -= dropped


METRICS_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats",
        kind="AFTER",
        function=report_running,
        signature="(self, stats)",
        capability="reports",
        why="The gauges of running requests belong to the same moment as SGLang's own.",
        upstream="Metrics that a plugin registers with the collector.",
        uses=(
            *names(
                "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector",
                "_counter_cls _gauge_cls _histogram_cls labels",
            ),
            *names(SCHEDULER, "device metrics_reporter running_batch"),
            *names(REPORTER, "current_scheduler_metrics_enabled metrics_collector"),
            "sglang.srt.utils.device_timer.DeviceTimer.wrap",
        ),
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.pool_stats_observer.PoolStats.get_decode_usage_msg_parts",
        kind="AFTER",
        function=add_to_decode_log,
        signature="(self)",
        capability="reports",
        why="The decode log line tells the size of the pool in use, but not what it would be without the policy.",
        upstream="Parts of the log line that a plugin adds.",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.load_inquirer.SchedulerLoadInquirer.get_loads",
        kind="AFTER",
        function=count_what_was_kept,
        signature="(self)",
        why="What waits is counted by all it has seen, and one that comes back with a copy will hold far less.",
        upstream="A request says how many slots it will hold when it runs.",
        uses=(
            *names("sglang.srt.managers.scheduler_components.load_inquirer.SchedulerLoadInquirer", "get_waiting_queue"),
            *names("sglang.srt.managers.load_snapshot.LoadSnapshot", "num_active_tokens num_total_tokens"),
            f"{REQ}.seqlen",
        ),
    ),
)
