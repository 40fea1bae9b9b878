"""Prometheus metrics of the policy, beside SGLang's own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rkv_sglang.integration.runtime.stats import PolicyStats

PREFIX = "rkv:"
# Seconds; a compaction on a GPU takes well under a millisecond, one on a CPU tens of them.
BUCKETS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
COUNTERS = {
    "compactions": "Compactions of a request's KV cache, those of prompts among them.",
    "prompt_compactions": "Compactions of a request's prompt.",
    "evicted_tokens": "Tokens whose KV was dropped, in every layer and KV head the same number.",
    "requests_compressed": "Requests compacted at least once.",
    "requests_restored": "Times that a preempted request went on from a host copy of its compacted KV.",
    "requests_aborted": "Requests ended because, once preempted, they could neither be computed again nor restored.",
}
GAUGES = {
    "resident_tokens": "Tokens that the running requests hold in the KV pool, shared prompts counted once a request.",
    "logical_tokens": "Tokens that the running requests would hold without a KV policy.",
    "side_buffer_bytes": "Bytes of the KV policy's own buffers on this rank.",
}
SECONDS = ("compaction_seconds", "Time to compact all requests that were due before one decode step, on the device.")


class PolicyMetrics:
    """The policy's series of one scheduler, with the labels of SGLang's own."""

    def __init__(self, collector: Any, *, on_gpu: bool) -> None:
        """Register the series. ``collector`` is SGLang's ``SchedulerMetricsCollector``, which may bring own classes."""
        # Only now: SGLang sets the folder that the processes share before it makes its collector.
        import prometheus_client

        labels = collector.labels
        bases = {
            "Counter": getattr(collector, "_counter_cls", None) or prometheus_client.Counter,
            "Gauge": getattr(collector, "_gauge_cls", None) or prometheus_client.Gauge,
            "Histogram": getattr(collector, "_histogram_cls", None) or prometheus_client.Histogram,
        }

        def make(kind: str, name: str, text: str, **options: Any) -> Any:
            series = bases[kind](name=PREFIX + name, documentation=text, labelnames=list(labels), **options)
            return series.labels(**labels)

        self._counters = {name: make("Counter", f"{name}_total", text) for name, text in COUNTERS.items()}
        self._gauges = {
            name: make("Gauge", name, text, multiprocess_mode="mostrecent") for name, text in GAUGES.items()
        }
        self._seconds = make("Histogram", *SECONDS, buckets=BUCKETS)
        self._counted = dict.fromkeys(COUNTERS, 0)
        self._timer = _device_timer(self._seconds) if on_gpu else None

    def count(self, stats: PolicyStats) -> None:
        """Bring the counters up to ``stats``."""
        totals = asdict(stats)
        for name, counter in self._counters.items():
            if totals[name] > self._counted[name]:
                counter.inc(totals[name] - self._counted[name])
                self._counted[name] = totals[name]

    def set(self, **values: int) -> None:
        """Set gauges by name."""
        for name, value in values.items():
            self._gauges[name].set(value)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Observe how long the work queued within takes on the current stream of the device; never waits for it."""
        if self._timer is not None:
            with self._timer.wrap(metadata={}):
                yield
            return
        start = time.perf_counter()
        yield
        self._seconds.observe(time.perf_counter() - start)


def _device_timer(histogram: Any) -> Any:
    from sglang.srt.utils.device_timer import DeviceTimer

    return DeviceTimer(lambda t: histogram.observe(t))


def metrics_for(scheduler: Any, *, side_bytes: int) -> PolicyMetrics | None:
    """Return the policy's metrics if this scheduler reports any."""
    reporter = scheduler.metrics_reporter
    if not reporter.current_scheduler_metrics_enabled:
        return None
    metrics = PolicyMetrics(reporter.metrics_collector, on_gpu=str(scheduler.device).startswith("cuda"))
    metrics.set(side_buffer_bytes=side_bytes, resident_tokens=0, logical_tokens=0)
    return metrics
