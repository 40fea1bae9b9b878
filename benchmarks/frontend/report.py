"""The comparison of frontend programs as a Markdown table and as ``frontend.png``."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, read_table
from benchmarks.common.tables import FRONTEND


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
    pyplot = load_pyplot()
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
