"""The accuracy of a results folder as a Markdown table and in pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, read_table
from benchmarks.common.settings import without_sizes
from benchmarks.common.tables import ACCURACY, ACCURACY_POOLED
from rkv_sglang.config import NO_POLICY


def markdown(rows: Sequence[Row], device: str, control: str = "") -> str:
    """Return the rows as a table.

    Args:
        device: What an hour is an hour of, where the rows have times.
        control: The one that was named; empty without.
    """
    # Answers that shared a GPU have no time of their own.
    has_times = not math.isnan(float(rows[0]["seconds"]))
    head = (
        "setting",
        "right",
        "right less none",
        "right less control",
        "kept",
        "kept less control",
        "held",
        "tokens",
        "truncated",
        "no answer",
        "compressed",
        "compactions",
        *([f"right per {device}-hour"] if has_times else []),
    )
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append(
            (
                str(row["setting"]),
                _interval(row, "pass_at_1"),
                "" if row["policy"] == NO_POLICY else _interval(row, "pass_diff"),
                _against_control(row, "pass_less_control"),
                _interval(row, "kept"),
                _against_control(row, "kept_less_control"),
                f"{row['held']:.0%}",
                f"{row['tokens_mean']:.0f} (median {row['tokens_median']:.0f})",
                *(f"{row[name]:.0%}" for name in ("truncated", "no_answer", "compressed")),
                f"{row['compactions']:.1f}",
                *([f"{row['correct_per_hour']:.1f}"] if has_times else []),
            )
        )
    first = rows[0]
    notes = [f"{row['setting']}: {row['note']}." for row in rows if row["note"]]
    what = (
        f"{first['dataset']}: {first['problems']} problems, {first['samples']} samples each. Brackets: 95 % percentile "
        f"bootstrap interval over problems. Control: {control or 'random_attention of the same budget'}. Kept: the "
        f"final answer of none's sample, which in {_neither(rows):.0%} of them is that there is none."
    )
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", what, *notes])


def pooled_markdown(rows: Sequence[Row]) -> str:
    """Return the rows of ``ACCURACY_POOLED`` as a table."""
    lines = [["over several budgets", "sizes", "kept", "less control", "right", "less control", "held", "control"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        lines.append(
            [
                str(row["variant"]),
                str(row["sizes"]),
                _interval(row, "kept"),
                _against_control(row, "kept_less_control", "variant"),
                _interval(row, "pass_at_1"),
                _against_control(row, "pass_less_control", "variant"),
                f"{row['held']:.0%}",
                str(row["control"]),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _neither(rows: Sequence[Row]) -> float:
    return next((float(row["no_answer"]) for row in rows if row["policy"] == NO_POLICY), 0.0)


def _against_control(row: Row, name: str, whose: str = "setting") -> str:
    return "" if row["control"] == row[whose] else _interval(row, name)


def _interval(row: Row, name: str) -> str:
    mean, low, high = (float(row[column]) for column in (name, f"{name}_low", f"{name}_high"))
    return "" if mean != mean else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def plot(folder: Path) -> Path:
    """Draw ``accuracy.png`` from ``accuracy.csv`` in ``folder``: over the share of the cache that was held, what each
    policy keeps, gets right and writes, with its intervals; budgets of one policy are joined."""
    pyplot = load_pyplot()
    rows = read_table(folder, ACCURACY)
    panels = (
        ("kept", "final answer of the full cache kept"),
        ("pass_at_1", "right answers (pass@1)"),
        ("tokens_mean", "output tokens of an answer"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 6), layout="constrained")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(without_sizes(str(row["setting"])), []).append(row)
    colours = pyplot.get_cmap("tab20")
    for number, (label, of_one) in enumerate(lines.items()):
        of_one.sort(key=lambda row: float(row["held"]))
        held = [float(row["held"]) for row in of_one]
        # More settings than colours.
        look = {"color": colours(number % 20), "marker": "osD^v*"[number // 20 % 6], "label": label, "linewidth": 1}
        for place, (column, _) in zip(axes, panels, strict=True):
            place.errorbar(
                held, [float(row[column]) for row in of_one], yerr=_errors(of_one, column), capsize=3, alpha=0.8, **look
            )
    for place, (column, title) in zip(axes, panels, strict=True):
        place.set_title(title, fontsize=10)
        place.set_xlabel("share of generated tokens held at the end of an answer")
        place.set_ylim(0, 1 if column != "tokens_mean" else None)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(
        f"{rows[0]['dataset']}: {rows[0]['problems']} problems, {rows[0]['samples']} samples each; 95 % intervals over "
        "problems"
    )
    path = folder / "accuracy.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def plot_pooled(folder: Path) -> Path:
    """Draw ``accuracy_pooled.png`` from its CSV in ``folder``: each variant less its control over budgets."""
    pyplot = load_pyplot()
    rows = read_table(folder, ACCURACY_POOLED)
    rows.sort(key=lambda row: float(row["kept_less_control"]))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 1.8 + 0.3 * len(rows)), layout="constrained", sharey=True)
    panels = (("kept_less_control", "kept, less the control's"), ("pass_less_control", "right, less the control's"))
    for place, (column, title) in zip(axes, panels, strict=True):
        means = [float(row[column]) for row in rows]
        place.errorbar(means, range(len(rows)), xerr=_errors(rows, column), fmt="o", capsize=3)
        place.axvline(0, color="grey", linewidth=1)
        place.set_title(title, fontsize=10)
        place.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [f"{row['variant']}  ({row['sizes']})" for row in rows], fontsize=8)
    controls = ", ".join(sorted({str(row["control"]) for row in rows} - {""})) or "none"
    figure.suptitle(
        f"{rows[0]['dataset']}: each of {rows[0]['problems']} problems by its mean over budgets; 95 % intervals over "
        f"problems\ncontrol: {controls}",
        fontsize=10,
    )
    path = folder / "accuracy_pooled.png"
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
