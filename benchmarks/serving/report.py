"""Tables for the terminal and ``serving.png``, both from the CSV alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, read_table
from benchmarks.common.tables import SERVING
from benchmarks.serving.rows import Ratio, crossover, throughput_ratios
from rkv_sglang.config import NO_POLICY

BASELINES = (NO_POLICY, "stock")


def baseline_of(rows: Sequence[Row]) -> str:
    """Return the setting that others are compared with: ``none`` if it was run, else the first."""
    names = [str(row["setting"]) for row in rows]
    return next((name for name in BASELINES if name in names), names[0])


def summary(rows: Sequence[Row]) -> str:
    """Return Markdown tables: the medians over rounds of every setting, and the ratios of throughput with verdicts."""
    baseline = baseline_of(rows)
    columns = {
        "tokens/s": ("tokens_per_s", 1),
        "TTFT p50": ("ttft_p50", 0),
        "TTFT p99": ("ttft_p99", 0),
        "ITL p50": ("itl_p50", 1),
        "ITL p99": ("itl_p99", 1),
        "at compaction p50": ("itl_compaction_p50", 1),
        "p99": ("itl_compaction_p99", 1),
        "queue p50": ("queue_p50", 0),
        "running mean": ("mean_running", 1),
        "peak": ("peak_running", 0),
        "retractions": ("retractions", 0),
        "prefix hits": ("prefix_hit_rate", 2),
        "compactions": ("compactions", 0),
        "compressed": ("compressed_share", 2),
        "failed": ("failed", 0),
    }
    lines = [
        "Medians over rounds; times in ms:",
        "",
        _line("arrivals", "pool", "setting", *columns),
        _line(*["---"] * (len(columns) + 3)),
    ]
    for arrivals, pool, name in dict.fromkeys((str(r["arrivals"]), float(r["pool"]), str(r["setting"])) for r in rows):
        mine = [r for r in rows if (r["arrivals"], r["pool"], r["setting"]) == (arrivals, pool, name)]
        cells = [f"{_median(mine, key):.{digits}f}" for key, digits in columns.values()]
        lines.append(_line(arrivals, f"{pool:g}", name, *("" if cell == "nan" else cell for cell in cells)))
    lines += ["", f"Throughput over that of {baseline} in the same round:", ""]
    lines += [_line("arrivals", "pool", "setting", "median", "least", "most", "verdict"), _line(*["---"] * 7)]
    by_setting: dict[tuple[str, str], dict[float, Ratio]] = {}
    for (arrivals, name, pool), ratio in throughput_ratios(rows, baseline).items():
        by_setting.setdefault((arrivals, name), {})[pool] = ratio
        values = (f"{value:.2f}" for value in (ratio.median, ratio.low, ratio.high))
        lines.append(_line(arrivals, f"{pool:g}", name, *values, ratio.verdict))
    policies = {str(row["setting"]) for row in rows if row["policy"] != NO_POLICY}
    lines += [""]
    lines += [
        f"{name}, {arrivals}, by medians: {crossover(mine)}"
        for (arrivals, name), mine in by_setting.items()
        if name in policies
    ]
    return "\n".join(lines)


def _median(rows: Sequence[Row], column: str) -> float:
    """Return the median of what is a number; NaN of nothing."""
    values = [value for value in (float(row[column]) for row in rows) if value == value]
    return statistics.median(values) if values else float("nan")


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(folder: Path) -> Path:
    """Draw ``serving.png`` from ``serving.csv`` in ``folder`` and return its path."""
    pyplot = load_pyplot()
    rows = read_table(folder, SERVING)
    baseline = baseline_of(rows)
    kinds = list(dict.fromkeys(str(row["arrivals"]) for row in rows))
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(str(row["setting"]) for row in rows))}
    figure, grid = pyplot.subplots(2 * len(kinds), 2, figsize=(11, 9.5 * len(kinds)), layout="constrained")
    for i, kind in enumerate(kinds):
        mine = [row for row in rows if row["arrivals"] == kind]
        ratio, running, ttft, itl = panels = list(grid[2 * i : 2 * i + 2].flat)
        _draw_ratios(ratio, mine, baseline, colors)
        ratio.set_title(f"{kind} arrivals: throughput over that of {baseline}")
        _draw_columns(running, mine, colors, {"mean_running": "mean", "peak_running": "peak"})
        running.set_title("requests in the decode batch")
        _draw_columns(ttft, mine, colors, {"ttft_p50": "p50", "ttft_p99": "p99"}, scale=1e-3)
        ttft.set(title="time to first token, s", yscale="log")
        _draw_columns(
            itl, mine, colors, {"itl_p50": "p50", "itl_p99": "p99", "itl_compaction_p50": "p50 at compactions"}
        )
        itl.set(title="between two tokens, ms", yscale="log")
        for panel in panels:
            _mark_pools(panel, mine, label="holds all requests at once" if panel is ratio else None)
            panel.grid(alpha=0.25)
            # Below, where it covers no line, however many settings there are.
            panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    rounds = len({row["round"] for row in rows})
    figure.suptitle(f"equal memory, KV pool and side buffers together; medians over {rounds} rounds")
    path = folder / "serving.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _mark_pools(panel: Any, rows: Sequence[Row], label: str | None) -> None:
    """Put ticks at the pools and a line where all requests of the trace would fit at once, uncompressed."""
    pools = sorted({float(row["pool"]) for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(pools, [f"{pool:g}" for pool in pools])
    panel.minorticks_off()
    if pools[-1] < 1:
        panel.set_xlabel("--mem-fraction-static")
        return
    panel.set_xlabel("memory, as tokens of a KV pool without a policy")
    whole = statistics.mean(float(row["trace_tokens"]) for row in rows)
    panel.axvline(whole, color="gray", linestyle=":", label=label)


def _draw_ratios(panel: Any, rows: Sequence[Row], baseline: str, colors: dict[str, str]) -> None:
    """Draw the median ratio with the range of the rounds; crosses where nothing was compressed."""
    ratios = throughput_ratios(rows, baseline)
    panel.axhline(1, color="black", linewidth=1)
    for name in dict.fromkeys(key[1] for key in ratios):
        mine = sorted((pool, ratio) for (_, setting, pool), ratio in ratios.items() if setting == name)
        pools = [pool for pool, _ in mine]
        medians = [ratio.median for _, ratio in mine]
        ends = [[r.median - r.low for _, r in mine], [r.high - r.median for _, r in mine]]
        panel.errorbar(
            pools, medians, ends, marker="o", capsize=4, color=colors[name], label=f"{name}, median and range"
        )
        for pool, ratio in mine:
            panel.plot([pool] * len(ratio.by_round), ratio.by_round, ".", color=colors[name], alpha=0.5)
        idle = [(pool, ratio.median) for pool, ratio in mine if ratio.uncompressed]
        if idle:
            panel.plot(*zip(*idle, strict=True), "rx", markersize=14, label=f"{name}: nothing was compressed")


def _draw_columns(
    panel: Any, rows: Sequence[Row], colors: dict[str, str], columns: dict[str, str], scale: float = 1
) -> None:
    """Draw the median over rounds of some columns, one colour a setting and one line style a column."""
    for name in colors:
        for style, (column, label) in zip(("-", "--", ":"), columns.items(), strict=False):
            mine = [row for row in rows if row["setting"] == name]
            pools = sorted({float(row["pool"]) for row in mine})
            values = [
                statistics.median([float(row[column]) * scale for row in mine if row["pool"] == pool]) for pool in pools
            ]
            if any(value == value for value in values):
                panel.plot(pools, values, style, marker="o", markersize=3, color=colors[name], label=f"{name}, {label}")
