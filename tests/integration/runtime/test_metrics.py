"""The policy's metrics: what is registered, and that the dashboard asks for nothing else."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import prometheus_client
import pytest
from sglang.srt.observability import metrics_collector

from rkv_sglang.integration.runtime.metrics import COUNTERS, GAUGES, PREFIX, SECONDS, PolicyMetrics
from rkv_sglang.integration.runtime.stats import PolicyStats
from rkv_sglang.sizes.compaction_plan import plan_compaction
from rkv_sglang.sizes.lengths import RequestState

DASHBOARD = Path(__file__).parents[3] / "docs" / "deploy" / "grafana.json"


@pytest.fixture
def registry(monkeypatch):
    """One of its own, so that a test can register the series again."""
    fresh = prometheus_client.CollectorRegistry()
    for kind in ("Counter", "Gauge", "Histogram"):
        base = getattr(prometheus_client, kind)
        monkeypatch.setattr(
            prometheus_client, kind, lambda *a, base=base, **k: base(*a, registry=fresh, **k), raising=True
        )
    return fresh


LABELS = {"model_name": "m", "engine_type": "unified", "tp_rank": 0}


def test_counters_follow_the_stats_and_are_never_counted_twice(registry):
    metrics, stats = PolicyMetrics(SimpleNamespace(labels=LABELS), on_gpu=False), PolicyStats()
    for resident_len in (20, 20, 17):
        state = RequestState(4, 100)
        plan = plan_compaction(prompt_len=4, resident_len=resident_len, budget=10, page_size=1)
        state.record(plan)
        stats.count(plan, state)
        with metrics.timed():
            pass
        metrics.count(stats)
        metrics.count(stats)

    def value(name: str) -> float | None:
        return registry.get_sample_value(PREFIX + name, {key: str(value) for key, value in LABELS.items()})

    assert (value("compactions_total"), value("evicted_tokens_total")) == (3, 6 + 6 + 3)
    assert [value(f"requests_{what}_total") for what in ("compressed", "restored", "aborted")] == [3, 0, 0]
    assert value("compaction_seconds_count") == 3


def test_a_request_counts_once_however_often_it_is_compacted_and_what_of_it_is_discarded():
    stats, plan = PolicyStats(), plan_compaction(prompt_len=4, resident_len=20, budget=10, page_size=1)
    for compactions, discarded in ((1, 0), (2, 3), (0, 2)):
        state = RequestState(4, 100)
        for number in range(discarded + compactions):
            if number == discarded:
                state.forget_answer()
            state.record(plan)
            stats.count(plan, state)
    assert (stats.compactions, stats.evicted_tokens, stats.requests_compressed) == (8, 48, 3)


def test_the_dashboard_shows_series_that_exist():
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"\b(?:rkv|sglang):\w+", " ".join(expressions)))
    ours = {f"{PREFIX}{name}_total" for name in COUNTERS} | {PREFIX + name for name in GAUGES}
    ours |= {f"{PREFIX}{SECONDS[0]}_{part}" for part in ("bucket", "sum")}
    assert {name for name in asked if name.startswith(PREFIX)} == ours
    source = Path(metrics_collector.__file__).read_text()
    assert all(f'"{name}"' in source for name in asked - ours)
