"""The accuracy of a results folder as a Markdown table and as ``accuracy.png``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, read_table
from benchmarks.common.tables import ACCURACY
from rkv_sglang.config import NO_POLICY


def markdown(rows: Sequence[Row], device: str) -> str:
    """Return the rows as a table; ``device`` says what an hour is an hour of."""
    head = (
        "setting",
        "pass@1",
        "less none",
        "tokens",
        "truncated",
        "no answer",
        "compressed",
        f"right per {device}-hour",
    )
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append(
            (
                str(row["setting"]),
                _interval(row, "pass_at_1"),
                "" if row["policy"] == NO_POLICY else _interval(row, "pass_diff"),
                f"{row['tokens_mean']:.0f} (median {row['tokens_median']:.0f})",
                *(f"{row[name]:.0%}" for name in ("truncated", "no_answer", "compressed")),
                f"{row['correct_per_hour']:.1f}",
            )
        )
    first = rows[0]
    notes = [f"{row['setting']}: {row['note']}." for row in rows if row["note"]]
    what = (
        f"{first['dataset']}: {first['problems']} problems, {first['samples']} samples each. Brackets: 95 % percentile "
        "bootstrap interval over problems."
    )
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", what, *notes])


def _interval(row: Row, name: str) -> str:
    mean, low, high = (float(row[column]) for column in (name, f"{name}_low", f"{name}_high"))
    return "" if mean != mean else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def plot(folder: Path) -> Path:
    """Draw ``accuracy.png`` from ``accuracy.csv`` in ``folder``: one line a setting in every panel."""
    pyplot = load_pyplot()
    rows = read_table(folder, ACCURACY)
    names = [str(row["setting"]) for row in rows]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 1.4 + 0.4 * len(rows)), layout="constrained", sharey=True)
    panels = (
        ("pass_at_1", "pass@1, 95 % interval over problems"),
        ("tokens_mean", "output tokens of a sample (mean)"),
        ("correct_per_hour", "right samples per hour of a device"),
    )
    for place, (column, title) in zip(axes, panels, strict=True):
        values = [float(row[column]) for row in rows]
        place.barh(range(len(rows)), values, alpha=0.4, xerr=_errors(rows, column), capsize=3)
        place.set_title(title, fontsize=10)
        place.set_xlim(0, 1 if column == "pass_at_1" else None)
    for level, row in enumerate(rows):
        axes[1].annotate(f" {row['truncated']:.0%} truncated", (0, level), va="center", fontsize=8)
        axes[0].annotate(f" {row['compressed']:.0%} compressed", (0, level), va="center", fontsize=8)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    figure.suptitle(f"{rows[0]['dataset']}: {rows[0]['problems']} problems, {rows[0]['samples']} samples each")
    path = folder / "accuracy.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _errors(rows: Sequence[Row], column: str) -> Any:
    if f"{column}_low" not in rows[0]:
        return None
    ends: list[list[float]] = [[], []]
    for row in rows:
        mean = float(row[column])
        ends[0].append(mean - float(row[f"{column}_low"]))
        ends[1].append(float(row[f"{column}_high"]) - mean)
    return ends
