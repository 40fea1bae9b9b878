"""What a reader sees of frontend_programs: the rows, a Markdown table and ``frontend.png``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.schema import Row, read_table
from benchmarks.tables import FRONTEND

if TYPE_CHECKING:
    from benchmarks.frontend_run import ProgramRun


def frontend_rows(
    without: Mapping[str, ProgramRun], compressed: Mapping[str, ProgramRun], budget: int, buffer: int
) -> list[Row]:
    """Return two rows a program: the server without a policy, then the one with ``rkv``."""
    # Imported here because it imports SGLang, which a plot does not need.
    from benchmarks.frontend_run import compared_hits

    rows: list[Row] = []
    for name, theirs in without.items():
        ours = compressed[name]
        hits = compared_hits(theirs, ours)
        for setting, run, sizes in (("none", theirs, (0, 0)), ("rkv", ours, (budget, buffer))):
            rows.append(
                {
                    "program": name,
                    "setting": setting,
                    "budget": sizes[0],
                    "buffer": sizes[1],
                    "variables": len(run.texts),
                    "equal_texts": sum(text == theirs.texts.get(variable) for variable, text in run.texts.items()),
                    "choices": " ".join(run.choices.values()),
                    "calls": len(run.calls),
                    "compressed": sum(call.compactions > 0 for call in run.calls),
                    "compactions": sum(call.compactions for call in run.calls),
                    "output_tokens": sum(call.output_tokens for call in run.calls),
                    "prompt_tokens": sum(call.prompt_tokens for call in run.calls),
                    "cached_tokens": sum(call.cached_tokens for call in run.calls),
                    "compared_calls": len(hits),
                    "compared_cached_tokens": sum(pair[setting == "rkv"] for pair in hits),
                }
            )
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table, both servers of a program in one line."""
    head = (
        *("program", "variables", "equal texts", "requests none/rkv", "compressed", "compactions"),
        *("prefix hits none/rkv, tokens", "of them for the same prompts"),
    )
    lines = [head, ["---"] * len(head)]
    for none, rkv in zip(rows[::2], rows[1::2], strict=True):
        both = {name: f"{none[name]}/{rkv[name]}" for name in ("calls", "cached_tokens", "compared_cached_tokens")}
        plain = [str(rkv[name]) for name in ("program", "variables", "equal_texts")]
        counts = [str(rkv[name]) for name in ("compressed", "compactions")]
        lines.append([*plain, both["calls"], *counts, both["cached_tokens"], both["compared_cached_tokens"]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(folder: Path) -> Path:
    """Draw ``frontend.png`` from ``frontend.csv``: per program the prefix hits of both servers and the equal texts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_table(folder, FRONTEND)
    programs = list(dict.fromkeys(str(row["program"]) for row in rows))
    figure, (hits, texts) = pyplot.subplots(
        1, 2, figsize=(9, 1.2 + 0.4 * len(programs)), layout="constrained", sharey=True
    )
    for shift, setting in ((-0.2, "none"), (0.2, "rkv")):
        shares = [
            float(row["cached_tokens"]) / max(float(row["prompt_tokens"]), 1)
            for row in rows
            if row["setting"] == setting
        ]
        hits.barh([level + shift for level in range(len(programs))], shares, 0.38, label=setting)
    ours = [row for row in rows if row["setting"] == "rkv"]
    equal = [float(row["equal_texts"]) / float(row["variables"]) for row in ours]
    texts.barh(range(len(programs)), equal, 0.6, color="lightgrey")
    for level, row in enumerate(ours):
        texts.annotate(
            f" {row['compressed']} of {row['calls']} requests compressed", (0, level), va="center", fontsize=8
        )
    hits.set(xlabel="share of prompt tokens found in the prefix cache", xlim=(0, 1))
    hits.set_yticks(range(len(programs)), programs)
    hits.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2)
    texts.set(xlabel="share of texts equal to those without a policy", xlim=(0, 1))
    path = folder / "frontend.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
