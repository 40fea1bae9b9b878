"""Markdown tables and ``quality.png``, both from the CSVs alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, Table, read_table
from benchmarks.common.tables import QUALITY_FORCED, QUALITY_FREE, QUALITY_POSITION, QUALITY_RECALL
from rkv_sglang.config import NO_POLICY


def read_if_there(folder: Path, table: Table) -> list[Row]:
    """Return the rows of a table; none if its part was not run."""
    return read_table(folder, table) if (folder / f"{table.name}.csv").exists() else []


def markdown(folder: Path) -> str:
    """Return the tables of a results folder, with intervals, as Markdown."""
    forced, free, recall = (read_if_there(folder, table) for table in (QUALITY_FORCED, QUALITY_FREE, QUALITY_RECALL))
    blocks = []
    if forced:
        names = {"agreement": 3, "kl": 4, "nll_diff": 4, "kl_less_random": 4}
        blocks.append(
            "Along the full cache's greedy answer (`fresh`: after the first compaction, repeated text left out; "
            "`none`: self-check):\n\n"
            + _grid(("server", "policy", "budget", "span", "prompts", "steps"), names, forced)
        )
    if free:
        names = {"length": 0, "repetition": 3, "divergence": 0, "diverged": 2}
        blocks.append("Greedy, left to itself:\n\n" + _grid(("policy", "budget", "prompts"), names, free))
    if recall:
        names = {"exact": 3, "nll": 3, "nll_diff": 3}
        fixed = ("policy", "budget", "age", "age_end", "prompts", "facts", "exact_full")
        blocks.append(
            "Facts of the generated text, asked for when `age` compactions old:\n\n" + _grid(fixed, names, recall)
        )
    return "\n\n".join([*blocks, "Brackets: 95 % percentile bootstrap interval over prompts."])


def _grid(fixed: Sequence[str], estimates: dict[str, int], rows: Iterable[Row]) -> str:
    lines = [[*fixed, *estimates], ["---"] * (len(fixed) + len(estimates))]
    for row in rows:
        plain = [_text(row[name]) for name in fixed]
        lines.append([*plain, *(_interval(row, name, digits) for name, digits in estimates.items())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _interval(row: Row, name: str, digits: int) -> str:
    mean, low, high = (float(row[column]) for column in (name, f"{name}_low", f"{name}_high"))
    return "" if mean != mean else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def plot(folder: Path) -> Path:
    """Draw ``quality.png`` from the CSVs in ``folder``; parts that were not run stay empty."""
    pyplot = load_pyplot()
    forced, position, free, recall = (
        read_if_there(folder, table) for table in (QUALITY_FORCED, QUALITY_POSITION, QUALITY_FREE, QUALITY_RECALL)
    )
    # After the first compaction all policies differ; before it none does.
    compacted, fresh = ([row for row in forced if row["span"] == span] for span in ("compacted", "fresh"))
    all_rows = [*forced, *position, *free, *recall]
    least = min((row["budget"] for row in all_rows if row["budget"]), default=0)
    policies = list(dict.fromkeys(str(row["policy"]) for row in all_rows if row["policy"] != NO_POLICY))
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    panels: tuple[tuple[list[Row], str, str, str], ...] = (
        (compacted, "budget", "agreement", "top-1 agreement after the first compaction"),
        (fresh, "budget", "kl", "KL(full || compressed), nats, fresh text only"),
        (_of_budget(position, least), "position", "kl", f"KL by position, nats, budget {least}"),
        (free, "budget", "divergence", "left to itself: first token that differs"),
        (free, "budget", "repetition", "left to itself: repeated 4-grams"),
        (_of_budget(recall, least), "age", "exact", f"exact recall by compactions since, budget {least}"),
    )
    for place, (rows, x, y, title) in zip(axes.flat, panels, strict=True):
        _draw(place, rows, policies, x, y)
        if not rows:
            place.set(xticks=[], yticks=[])
            place.text(0.5, 0.5, "not measured", ha="center", va="center", transform=place.transAxes)
        place.set(title=title, xlabel={"age": "compactions since the fact was written"}.get(x, f"{x}, tokens"))
    full = [row for row in free if row["policy"] == NO_POLICY]
    if full:
        axes[1, 1].axhline(float(full[0]["repetition"]), color="black", linestyle=":", label="full cache")
    same = [row for row in _of_budget(recall, least) if row["policy"] == policies[0]]
    if same:
        axes[1, 2].plot([row["age"] for row in same], [row["exact_full"] for row in same], "k:", label="full cache")
        axes[1, 2].set_xscale("symlog", base=2)
    handles = {
        label: line for place in axes.flat for line, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(len(handles), 1))
    path = folder / "quality.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _of_budget(rows: Iterable[Row], budget: Any) -> list[Row]:
    return [row for row in rows if row["budget"] == budget]


def _draw(place: Any, rows: Sequence[Row], policies: Sequence[str], x: str, y: str) -> None:
    """Draw one line a policy, with intervals as bars, each policy a little to the side of the others."""
    step = 0.004 * max((float(row[x]) for row in rows), default=0)
    for i, policy in enumerate(policies):
        mine = [row for row in rows if row["policy"] == policy]
        means = [float(row[y]) for row in mine]
        below = [mean - float(row[f"{y}_low"]) for mean, row in zip(means, mine, strict=True)]
        above = [float(row[f"{y}_high"]) - mean for mean, row in zip(means, mine, strict=True)]
        where = [float(row[x]) + (i - len(policies) / 2) * step for row in mine]
        if mine:
            place.errorbar(where, means, [below, above], marker="o", markersize=3, capsize=2, label=policy)
