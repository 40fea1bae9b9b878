"""What a soak found: the slope of memory, latencies, leaks, and a plot over time."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, read_table
from benchmarks.common.statistics import Estimate, slope_interval
from benchmarks.common.tables import SOAK

IDLE, LOAD = "idle", "load"
MEMORY = ("pss_main_mib", "pss_scheduler_mib", "pss_detokenizer_mib", "pss_other_mib")
# The first of the idle moments: caches of Python, torch and the allocator fill.
WARM_UP_SHARE = 0.2


def memory_slopes(rows: Sequence[Row], left_out: float = WARM_UP_SHARE) -> dict[str, Estimate]:
    """Return the growth of each kind of process and of all, MiB an hour, over the idle moments behind the warm-up.

    Args:
        left_out: Share of the idle moments that are the warm-up.
    """
    idle = [row for row in rows if row["phase"] == IDLE]
    idle = idle[int(len(idle) * left_out) :]
    hours = [float(row["seconds"]) / 3600 for row in idle]
    columns = {name: [float(row[name]) for row in idle] for name in MEMORY}
    columns["all"] = [sum(values) for values in zip(*columns.values(), strict=True)]
    return {name: slope_interval(hours, values) for name, values in columns.items()}


def leaked_tokens(rows: Sequence[Row]) -> int:
    """Return the most slots of the pool that were in use at an idle moment, with the prefix cache emptied."""
    return max((int(row["pool_tokens"]) for row in rows if row["phase"] == IDLE), default=0)


def latency_slope(rows: Sequence[Row]) -> Estimate:
    """Return the growth of the 99th percentile of the latency, ms an hour, over the moments under load."""
    load = [row for row in rows if row["phase"] == LOAD and float(row["latency_p99_ms"]) == row["latency_p99_ms"]]
    return slope_interval(
        [float(row["seconds"]) / 3600 for row in load], [float(row["latency_p99_ms"]) for row in load]
    )


def _median(values: Sequence[float]) -> float:
    """Return the median of what is a number: a sample in which no answer ended has no latency."""
    numbers = [value for value in values if value == value]
    return statistics.median(numbers) if numbers else float("nan")


def summary(rows: Sequence[Row]) -> str:
    """Return the findings, a line each."""
    last = rows[-1]
    load = [row for row in rows if row["phase"] == LOAD]
    halves = [load[: len(load) // 2], load[len(load) // 2 :]]
    later = memory_slopes(rows, left_out=0.5)
    lines = [
        f"{last['requests']} requests in {float(last['seconds']) / 60:.1f} minutes, {last['compactions']} compactions, "
        f"{last['retractions']} retractions, {last['restored']} restored",
        f"mismatches: {last['mismatches']}; errors: {last['errors']}; slots in use when idle: {leaked_tokens(rows)}",
        *(
            f"memory of {name.removeprefix('pss_').removesuffix('_mib')}: {_told(slope)} MiB an hour, "
            f"{_told(later[name])} in the second half"
            for name, slope in memory_slopes(rows).items()
        ),
        f"p99 of the latency: {_told(latency_slope(rows))} ms an hour, {_told(latency_slope(halves[1]))} in the second "
        "half; first half "
        + ", second half ".join(f"{_median([float(row['latency_p99_ms']) for row in half]):.0f} ms" for half in halves)
        + " (medians of the samples)",
    ]
    return "\n".join(lines)


def _told(estimate: Estimate) -> str:
    return f"{estimate.mean:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def plot(folder: Path) -> Path:
    """Draw ``soak.png`` from ``soak.csv``: memory, pool, latency and requests over time."""
    pyplot = load_pyplot()
    rows = read_table(folder, SOAK)
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained", sharex=True)
    minutes = [float(row["seconds"]) / 60 for row in rows]
    idle = [index for index, row in enumerate(rows) if row["phase"] == IDLE]
    memory, pool, latency, counts = axes.flat
    for name in MEMORY:
        values = [float(row[name]) for row in rows]
        label = name.removeprefix("pss_").removesuffix("_mib")
        (line,) = memory.plot(minutes, values, label=label, linewidth=1)
        memory.plot([minutes[i] for i in idle], [values[i] for i in idle], ".", color=line.get_color())
    memory.set_ylabel("PSS without files, MiB (dots: idle)")
    memory.set_ylim(0)
    memory.legend(fontsize=8)
    pool.plot(minutes, [float(row["pool_tokens"]) for row in rows], linewidth=1, label="slots in use")
    pool.plot([minutes[i] for i in idle], [float(rows[i]["pool_tokens"]) for i in idle], ".", label="idle, flushed")
    pool.set_ylabel("tokens of the pool")
    pool.legend(fontsize=8)
    for name in ("latency_p50_ms", "latency_p99_ms"):
        points = [(minute, float(row[name])) for minute, row in zip(minutes, rows, strict=True)]
        points = [(minute, value) for minute, value in points if value == value]
        latency.plot(*zip(*points, strict=True), label=name.split("_")[1], linewidth=1)
    latency.set_ylabel("ms to a whole answer")
    latency.set_ylim(0)
    latency.legend(fontsize=8)
    for name in ("requests", "mismatches", "errors"):
        counts.plot(minutes, [float(row[name]) for row in rows], label=name, linewidth=1)
    counts.set_ylabel("so far")
    counts.legend(fontsize=8)
    for place in (latency, counts):
        place.set_xlabel("minutes")
    path = folder / "soak.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
