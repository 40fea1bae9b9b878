"""Rows and pictures of recorded runs."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, Value, read_table
from benchmarks.common.tables import FUZZ, MUTATIONS, POOL_MACHINE
from tests.fuzz.campaign import Outcome
from tests.fuzz.draw.servers import is_tight
from tests.fuzz.server import ServerConfig

# Columns of which the run's JSON says how often each value was tried.
AXES = (
    *(
        "policy",
        "granularity",
        "model",
        "page_size",
        "chunk_size",
        "window",
        "overlap",
        "radix",
        "stagger",
        "priority",
        "tight_pool",
        "named_prefixes",
    ),
    *("tp_size", "tokenizer", "mixed_chunk"),
)


def _model_of(server: ServerConfig) -> str:
    """Return a server's model, and what is other than a plain pool of it."""
    kind = "" if server.kv_dtype == "auto" else f" in {server.kv_dtype}"
    return server.model + kind + (" with data-parallel attention" if server.attn_dp_size > 1 else "")


def row_of(outcome: Outcome) -> Row:
    """Return the row of one schedule."""
    schedule, record, counts = outcome.schedule, outcome.record, outcome.verdict.counts
    server = schedule.server
    kinds = Counter(event.kind for event in schedule.events)
    requests = schedule.requests
    stats = record.get("stats", {})
    return {
        "seed": schedule.seed,
        "policy": server.policy,
        "granularity": server.granularity,
        "model": _model_of(server),
        "budget": server.budget,
        "buffer": server.buffer,
        "window": server.window,
        "page_size": server.page_size,
        "chunk_size": server.chunk_size,
        "pool": server.pool,
        "tp_size": server.tp_size,
        "overlap": int(server.overlap),
        "radix": int(server.radix),
        "stagger": int(server.stagger),
        "priority": int(server.priority),
        "tokenizer": int(server.tokenizer),
        "mixed_chunk": int(server.mixed_chunk),
        "tight_pool": int(is_tight(server)),
        "named_prefixes": int(any(r.asks("create") for r in requests)),
        "requests": len(requests),
        "own_settings": sum(r.budget is not None or r.no_policy for r in requests),
        "penalties": sum(any(name.endswith("_penalty") for name in r.params) for r in requests),
        "prefixes_made": counts["prefixes made"],
        "prefixes_deleted": counts["prefixes deleted"],
        "behind_prefix": counts["behind a prefix"],
        "prefix_refusals": counts["refused for a prefix"],
        "aborts": sum(r.abort_at is not None or r.abort_after is not None for r in requests),
        "forced_retractions": kinds["retract"],
        "pauses": kinds["pause_retract"] + kinds["pause_in_place"],
        "flushes": kinds["flush"],
        "passes": int(record.get("passes", 0)),
        "most_running": int(record.get("max_running", 0)),
        "compactions": int(stats.get("compactions", 0)),
        "preemptions": sum(len(places) for places in record.get("retractions", {}).values()),
        "restores": int(stats.get("requests_restored", 0)),
        "by_oracle": counts["compared with the oracle"],
        "by_itself": counts["compared with itself alone"],
        "not_compared": counts["not compared"],
        "compared_preempted": counts["compared after a preemption"],
        "near_ties": counts["near-ties"],
        "violations": len(outcome.verdict.problems),
        "seconds": float(record.get("seconds", 0.0)),
    }


def shares(rows: Sequence[Row], axes: Sequence[str] = AXES) -> dict[str, dict[str, float]]:
    """Return of every axis which share of the rows has which value."""
    result: dict[str, dict[str, float]] = {}
    for axis in axes:
        counted: Counter[Value] = Counter(row[axis] for row in rows)
        result[axis] = {str(value): round(count / len(rows), 3) for value, count in sorted(counted.items(), key=str)}
    return result


def restores(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Return of every axis how many restores there were with which value."""
    result: dict[str, dict[str, int]] = {}
    for axis in AXES:
        counted: Counter[str] = Counter()
        for row in rows:
            counted[str(row[axis])] += int(row["restores"])
        result[axis] = dict(sorted((+counted).items()))
    return result


def totals(rows: Sequence[Row]) -> dict[str, float]:
    """Return the sums of all columns that count something."""
    first = [column.name for column in FUZZ.columns].index("requests")
    names = [column.name for column in FUZZ.columns[first:] if column.name != "most_running"]
    return {name: round(sum(float(row[name]) for row in rows), 1) for name in names}


def plot_schedules(folder: Path) -> Path:
    """Draw ``fuzz.png`` from ``fuzz.csv``: schedules by setting, and what happened in them."""
    rows = read_table(folder, FUZZ)
    pyplot = load_pyplot()
    figure, both = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    names, values = [], []
    for axis, of_axis in shares(rows).items():
        for value, share in of_axis.items():
            names.append(f"{axis} {value}")
            values.append(share * len(rows))
    both[0].barh(names, values)
    both[0].tick_params(axis="y", labelsize=5)
    both[0].set_title(f"{len(rows)} schedules by setting")
    _bars(both[1], {name: value for name, value in totals(rows).items() if name not in ("seconds", "passes")})
    path = folder / "fuzz.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def plot_pool_machine(folder: Path) -> Path:
    """Draw ``pool_machine.png`` from ``pool_machine.csv``: how often each step was taken."""
    rows = read_table(folder, POOL_MACHINE)
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    counted: Counter[str] = Counter()
    for row in rows:
        counted[str(row["step"])] += int(row["count"])
    _bars(axes, dict(counted))
    axes.set_title(f"{sum(counted.values())} steps of the pool machine")
    path = folder / "pool_machine.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def plot_mutations(folder: Path) -> Path:
    """Draw ``mutations.png`` from ``mutations.csv``: schedules that the fuzzer needed for each fault."""
    rows = read_table(folder, MUTATIONS)
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.22 * len(rows)), layout="constrained")
    marks = {"test_fails": "t", "pool_machine": "p"}
    _bars(
        axes,
        {
            f"{row['fault']} {''.join(mark for column, mark in marks.items() if int(row[column]) > 0)}": max(
                int(row["schedules"]), 0
            )
            for row in rows
        },
    )
    axes.set_title("schedules that the fuzzer needed; t: its test fails, p: the pool machine finds it", fontsize=8)
    path = folder / "mutations.png"
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path


def _bars(axes: Any, values: dict[str, float]) -> None:
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, fmt="%.0f", fontsize=6)
    axes.set_xscale("symlog")
    axes.tick_params(axis="y", labelsize=7)
