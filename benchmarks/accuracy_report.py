"""What a reader sees of bench_accuracy: the rows, a Markdown table and ``accuracy.png``."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy_run import NO_POLICY, Setting
from benchmarks.accuracy_store import Sample
from benchmarks.quality_stats import Estimate, mean_interval
from benchmarks.schema import Row, read_table
from benchmarks.tables import ACCURACY

NOTHING_COMPRESSED = "no sample was long enough to be compressed: the row says nothing about the policy"
PARTLY_COMPRESSED = "fewer than half of the samples were compressed"

# The samples of one setting by problem, each problem with the same number of them.
ByProblem = Mapping[str, Sequence[Sample]]


def busy_seconds(samples: Iterable[Sample]) -> float:
    """Return for how long at least one of the samples was under way: the length of the union of their spans.

    So the time between an interruption and the next run does not count, nor does the start of a server.
    """
    total, covered = 0.0, -math.inf
    for sample in sorted(samples, key=lambda sample: sample.start):
        total += max(0.0, sample.end - max(sample.start, covered))
        covered = max(covered, sample.end)
    return total


def pass_at_1(by_problem: ByProblem) -> list[float]:
    """Return for each problem the share of its samples that are right."""
    return [statistics.mean(sample.outcome == "right" for sample in samples) for samples in by_problem.values()]


def paired(ours: Sequence[float], theirs: Sequence[float] | None) -> Estimate:
    """Return the mean difference over problems with its interval; NaN if there is nothing to compare with."""
    return mean_interval([] if theirs is None else [a - b for a, b in zip(ours, theirs, strict=True)])


def accuracy_rows(dataset: str, results: Mapping[Setting, ByProblem]) -> list[Row]:
    """Return one row a setting; all settings have the same problems, in the same order."""
    baseline = next((by for setting, by in results.items() if setting.policy == NO_POLICY), None)
    return [_row(dataset, setting, by, baseline) for setting, by in results.items()]


def _row(dataset: str, setting: Setting, by_problem: ByProblem, baseline: ByProblem | None) -> Row:
    samples = [sample for of_one in by_problem.values() for sample in of_one]
    tokens = [sample.output_tokens for sample in samples]
    seconds, devices = busy_seconds(samples), samples[0].devices
    compressed = statistics.mean(sample.compactions > 0 for sample in samples)
    is_baseline = setting.policy == NO_POLICY
    return {
        "dataset": dataset,
        "setting": setting.name,
        "policy": setting.policy,
        "budget": setting.budget,
        "buffer": setting.buffer,
        "problems": len(by_problem),
        "samples": len(samples) // len(by_problem),
        **_columns("pass_at_1", mean_interval(pass_at_1(by_problem)), 4),
        "no_answer": round(statistics.mean(sample.outcome == "none" for sample in samples), 4),
        "tokens_mean": round(statistics.mean(tokens), 1),
        "tokens_median": float(statistics.median(tokens)),
        "truncated": round(statistics.mean(sample.truncated for sample in samples), 4),
        "compressed": round(compressed, 4),
        "compactions": round(statistics.mean(sample.compactions for sample in samples), 3),
        "seconds": round(seconds, 2),
        "devices": devices,
        "correct_per_hour": round(sum(s.outcome == "right" for s in samples) * 3600 / (seconds * devices), 3),
        **_columns("pass_diff", paired(pass_at_1(by_problem), baseline and pass_at_1(baseline)), 4),
        **_columns("tokens_diff", paired(_mean_tokens(by_problem), baseline and _mean_tokens(baseline)), 1),
        "note": "" if is_baseline or compressed >= 0.5 else PARTLY_COMPRESSED if compressed else NOTHING_COMPRESSED,
    }


def _mean_tokens(by_problem: ByProblem) -> list[float]:
    return [statistics.mean(sample.output_tokens for sample in samples) for samples in by_problem.values()]


def _columns(name: str, estimate: Estimate, digits: int) -> dict[str, float]:
    return {
        name: round(estimate.mean, digits),
        f"{name}_low": round(estimate.low, digits),
        f"{name}_high": round(estimate.high, digits),
    }


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
