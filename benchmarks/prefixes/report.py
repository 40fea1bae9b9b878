"""Markdown tables and ``prefixes.png``, both from the CSVs alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, Table, read_table
from benchmarks.common.tables import PREFIX_LOAD, PREFIX_RECALL
from rkv_sglang.config import NO_POLICY

# Of one run of requests: what is drawn and told, with its decimals.
_FIGURES = {
    "tokens_per_s": ("tokens/s", 1),
    "ttft_p50": ("first token p50, ms", 0),
    "ttft_p99": ("p99, ms", 0),
    "slots_held": ("slots held", 0),
    "peak_running": ("at once", 0),
    "prepare_s": ("to prepare, s", 1),
}


def read_if_there(folder: Path, table: Table) -> list[Row]:
    """Return the rows of a table; none if its part was not run."""
    return read_table(folder, table) if (folder / f"{table.name}.csv").exists() else []


def markdown(folder: Path) -> str:
    """Return the tables of a results folder as Markdown."""
    load, recall = (read_if_there(folder, table) for table in (PREFIX_LOAD, PREFIX_RECALL))
    return "\n\n".join([*([_load(load)] if load else []), *([_recall(recall)] if recall else [])])


def _load(rows: Sequence[Row]) -> str:
    head = ["server", "of the document", *(title for title, _ in _FIGURES.values()), "throughput over none"]
    lines = [head, ["---"] * len(head)]
    speed = {row["round"]: float(row["tokens_per_s"]) for row in rows if row["setting"] == NO_POLICY}
    for way, own in _by_way(rows).items():
        cells = [f"{_median(own, name):.{digits}f}" for name, (_, digits) in _FIGURES.items()]
        ratios = [float(row["tokens_per_s"]) / speed[row["round"]] for row in own]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append([*way, *cells, spread])
    return f"Medians over {len(speed)} rounds:\n\n" + _table(lines)


def _recall(rows: Sequence[Row]) -> str:
    names = ("exact", "less_full", "less_random")
    head = ["model", "way", "kept", "facts", *names]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        plain = [str(row[name]) for name in ("model", "way", "kept", "facts")]
        lines.append([*plain, *(_interval(row, name) for name in names)])
    told = "Share of facts answered right; brackets: 95 % percentile bootstrap interval over documents.\n\n"
    return told + _table(lines)


def _by_way(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows by server and what is held of the document, as they are called."""
    ways: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        ways.setdefault((str(row["setting"]), str(row["kept"] or "all")), []).append(row)
    return ways


def _median(rows: Sequence[Row], name: str) -> float:
    return statistics.median(float(row[name]) for row in rows)


def _interval(row: Row, name: str) -> str:
    mean, low, high = (float(row[column]) for column in (name, f"{name}_low", f"{name}_high"))
    return "" if mean != mean else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(folder: Path) -> Path:
    """Draw ``prefixes.png`` from the CSVs in ``folder``; a part that was not run is left out."""
    pyplot = load_pyplot()
    load, recall = (read_if_there(folder, table) for table in (PREFIX_LOAD, PREFIX_RECALL))
    models = list(dict.fromkeys(str(row["model"]) for row in recall))
    bars = list(_FIGURES)[:4] if load else []
    bars = [name for name in bars if name != "ttft_p99"]
    number = len(bars) + len(models)
    figure, grid = pyplot.subplots(1, number, figsize=(4.5 * number, 4.5), layout="constrained", squeeze=False)
    for place, name in zip(grid[0], bars, strict=False):
        _draw_bars(place, _by_way(load), name)
    for place, model in zip(grid[0][len(bars) :], models, strict=True):
        _draw_recall(place, [row for row in recall if row["model"] == model], model)
    path = folder / "prefixes.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_bars(place: Any, ways: dict[tuple[str, str], list[Row]], name: str) -> None:
    """Draw a bar a way, and a dot a round."""
    for level, rows in enumerate(ways.values()):
        values = [float(row[name]) for row in rows]
        place.barh(level, statistics.median(values), alpha=0.5)
        place.plot(values, [level] * len(values), "k.")
    place.set_yticks(range(len(ways)), [f"{setting}\n{kept} of the document" for setting, kept in ways], fontsize=8)
    place.invert_yaxis()
    place.set_title(_FIGURES[name][0])


def _draw_recall(place: Any, rows: Sequence[Row], model: str) -> None:
    """Draw a line a way over the tokens kept, and the whole document as a line across."""
    for way in dict.fromkeys(str(row["way"]) for row in rows):
        own = [row for row in rows if row["way"] == way]
        means = [float(row["exact"]) for row in own]
        if way == "full":
            place.axhline(means[0], color="grey", linestyle=":", label=way)
            continue
        spread = [[abs(float(row[f"exact_{end}"]) - float(row["exact"])) for row in own] for end in ("low", "high")]
        place.errorbar([float(row["kept"]) for row in own], means, spread, marker="o", capsize=3, label=way)
    place.set(xlabel="tokens kept of the document", ylabel="facts answered right", ylim=(-0.03, 1.03), title=model)
    place.legend(fontsize=8)
