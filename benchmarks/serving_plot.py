"""What a reader sees of bench_serving: tables for the terminal and ``serving.png``, both from the CSV alone."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.schema import Row, read_table
from benchmarks.serving_report import Ratio, throughput_ratios
from benchmarks.tables import SERVING

BASELINES = ("none", "stock")


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
        cells = [f"{statistics.median(float(r[key]) for r in mine):.{digits}f}" for key, digits in columns.values()]
        lines.append(_line(arrivals, f"{pool:g}", name, *("" if cell == "nan" else cell for cell in cells)))
    lines += ["", f"Throughput over that of {baseline} in the same round:", ""]
    lines += [_line("arrivals", "pool", "setting", "median", "least", "most", "verdict"), _line(*["---"] * 7)]
    for (arrivals, name, pool), ratio in throughput_ratios(rows, baseline).items():
        values = (f"{value:.2f}" for value in (ratio.median, ratio.low, ratio.high))
        # Not every setting has a policy that could have compressed something.
        lines.append(_line(arrivals, f"{pool:g}", name, *values, ratio.verdict))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(folder: Path) -> Path:
    """Draw ``serving.png`` from ``serving.csv`` in ``folder`` and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_table(folder, SERVING)
    kinds = list(dict.fromkeys(str(row["arrivals"]) for row in rows))
    figure, grid = pyplot.subplots(
        len(kinds), 4, figsize=(19, 4.4 * len(kinds)), layout="constrained", squeeze=False, sharex=True
    )
    settings = list(dict.fromkeys(str(row["setting"]) for row in rows))
    colors = {name: f"C{i}" for i, name in enumerate(settings)}
    for panels, kind in zip(grid, kinds, strict=True):
        mine = [row for row in rows if row["arrivals"] == kind]
        _draw_ratios(panels[0], mine, baseline_of(rows), colors)
        panels[0].set_title(f"{kind} arrivals: throughput over that of {baseline_of(rows)}")
        _draw_columns(panels[1], mine, colors, {"mean_running": "mean", "peak_running": "peak"})
        panels[1].set_title("requests in the decode batch")
        _draw_columns(panels[2], mine, colors, {"ttft_p50": "p50", "ttft_p99": "p99"}, scale=1e-3)
        panels[2].set(title="time to first token, s", yscale="log")
        _draw_columns(
            panels[3], mine, colors, {"itl_p50": "p50", "itl_p99": "p99", "itl_compaction_p50": "p50 at compactions"}
        )
        panels[3].set(title="between two tokens, ms", yscale="log")
        for panel in panels:
            panel.set_xscale("log", base=2)
            _mark_pools(panel, mine)
            panel.grid(alpha=0.25)
            panel.legend(fontsize=7)
    path = folder / "serving.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _mark_pools(panel: Any, rows: Sequence[Row]) -> None:
    pools = sorted({float(row["pool"]) for row in rows})
    panel.set_xticks(pools, [f"{pool:g}" for pool in pools])
    panel.minorticks_off()
    shares = pools[-1] < 1
    panel.set_xlabel("--mem-fraction-static" if shares else "memory of every server, as tokens of an uncompressed pool")
    if not shares:
        panel.axvline(
            statistics.mean(float(row["trace_tokens"]) for row in rows),
            color="gray",
            linestyle=":",
            label="all requests at once",
        )


def _draw_ratios(panel: Any, rows: Sequence[Row], baseline: str, colors: dict[str, str]) -> None:
    """Draw the median ratio with the range of the rounds; crosses where nothing was compressed."""
    ratios = throughput_ratios(rows, baseline)
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
            _mark_idle(panel, pool, ratio)
    panel.axhline(1, color="black", linewidth=1)


def _mark_idle(panel: Any, pool: float, ratio: Ratio) -> None:
    if ratio.uncompressed:
        panel.plot(pool, ratio.median, "rx", markersize=14, label="nothing was compressed")


def _draw_columns(
    panel: Any, rows: Sequence[Row], colors: dict[str, str], columns: dict[str, str], scale: float = 1
) -> None:
    """Draw the median over rounds of some columns, one colour a setting and one line style a column."""
    median: Callable[[list[float]], float] = statistics.median
    for name in colors:
        for style, (column, label) in zip(("-", "--", ":"), columns.items(), strict=False):
            mine = [row for row in rows if row["setting"] == name]
            pools = sorted({float(row["pool"]) for row in mine})
            values = [median([float(row[column]) * scale for row in mine if row["pool"] == pool]) for pool in pools]
            if any(value == value for value in values):
                panel.plot(pools, values, style, marker="o", markersize=3, color=colors[name], label=f"{name}, {label}")
