"""Variants over several budgets: every problem counts once, and only budgets that both have are compared."""

import math
import random

from benchmarks.accuracy.pooled import pooled_rows
from benchmarks.accuracy.report import pooled_markdown
from benchmarks.accuracy.rows import ByProblem, accuracy_rows
from benchmarks.accuracy.store import Sample
from benchmarks.common.settings import Setting, parse_setting
from tests.algorithm.cases import fresh_seed

RKV = [parse_setting(f"rkv:{size}") for size in ("64:32", "128:32", "224:32")]
OTHER = [parse_setting(f"rkv:{size}:32:window=16") for size in (64, 128)]
DRAW = [parse_setting(f"random_attention:{size}:32:granularity=head:window=8") for size in (64, 128)]
BLOCKS = [parse_setting(f"random_attention:{size}:32") for size in (128, 224)]
NONE = parse_setting("none")


def samples(outcomes: str, evicted_tokens: int = 0) -> ByProblem:
    """Return one sample of each problem, which are numbered; ``r`` is right, all else wrong."""
    return {
        str(number): [
            Sample(
                problem=str(number),
                sample=0,
                text="",
                outcome="right" if outcome == "r" else "wrong",
                found="",
                prompt_tokens=1,
                output_tokens=100,
                finish_reason="stop",
                compactions=1,
                evicted_tokens=evicted_tokens,
                start=0.0,
                end=1.0,
                devices=1,
            )
        ]
        for number, outcome in enumerate(outcomes)
    }


def kept(answers: str) -> dict[str, list[str]]:
    return {str(number): ["same" if answer == "k" else "other"] for number, answer in enumerate(answers)}


def test_by_hand() -> None:
    right = {RKV[0]: "rr--", RKV[1]: "r---", RKV[2]: "rrrr", DRAW[0]: "-r--", DRAW[1]: "----", BLOCKS[0]: "rrrr"}
    same = {RKV[0]: "kk--", RKV[1]: "kkk-", RKV[2]: "kkkk", DRAW[0]: "-k--", DRAW[1]: "-kk-", BLOCKS[0]: "----"}
    results = {NONE: samples("rrrr"), **{setting: samples(of_one, 50) for setting, of_one in right.items()}}
    comparisons = {NONE: kept("kkkk"), **{setting: kept(of_one) for setting, of_one in same.items()}}
    ours, control = pooled_rows("some", results, comparisons)
    # Of 224 there is no control, and of drawn blocks one budget alone.
    assert (ours["variant"], ours["sizes"], ours["problems"], ours["held"]) == ("rkv", "64:32 128:32", 4, 0.5)
    assert ours["control"] == control["variant"] == control["control"] == "random_attention:granularity=head:window=8"
    # Problem by problem 1, 1/2, 0, 0 right, the control's 0, 1/2, 0, 0; kept 1, 1, 1/2, 0 and 0, 1, 1/2, 0.
    assert (ours["pass_at_1"], ours["pass_less_control"]) == (0.375, 0.25)
    assert (ours["kept"], ours["kept_less_control"]) == (0.625, 0.25)
    assert ours["kept_less_control_low"] == 0 and ours["kept_less_control_high"] == 0.75
    assert control["kept_less_control"] == control["pass_less_control"] == 0
    table = pooled_markdown([ours, control])
    assert "| rkv | 64:32 128:32 | 0.625 [0.250, 1.000] | 0.250 [0.000, 0.750] |" in table
    # A named one of any budget stands for its variant.
    against = pooled_rows("some", results, comparisons, DRAW[0].name)
    assert [row["kept_less_control"] for row in against] == [0.25, 0]
    against = pooled_rows("some", results, comparisons, "rkv")
    assert {row["variant"]: row["sizes"] for row in against}["rkv"] == "64:32 128:32 224:32"


def test_a_control_of_the_same_granularity_and_window_comes_first() -> None:
    like_other = [parse_setting(f"random_attention:{size}:32:granularity=head:window=16") for size in (64, 128, 224)]
    settings = [*BLOCKS, *like_other, *DRAW, *RKV, parse_setting("rkv:128:32:granularity=request"), *OTHER]
    results = {setting: samples("rr") for setting in settings}
    comparisons = {setting: kept("kk") for setting in settings}
    rows = {row["variant"]: (row["control"], row["sizes"]) for row in pooled_rows("some", results, comparisons)}
    head = "random_attention:granularity=head:window=8"
    assert rows["rkv"] == rows[head] == (head, "64:32 128:32")
    assert rows["rkv:window=16"] == ("random_attention:granularity=head:window=16", "64:32 128:32")
    assert rows["random_attention"] == ("random_attention", "128:32 224:32")
    assert "rkv:granularity=request" not in rows
    # Without one, a variant stands for itself.
    alone = {setting: results[setting] for setting in RKV}
    (row,) = pooled_rows("some", alone, {setting: comparisons[setting] for setting in RKV})
    assert (row["control"], row["sizes"], row["kept"]) == ("", "64:32 128:32 224:32", 1)
    assert math.isnan(float(row["kept_less_control"]))


def test_one_budget_twice_is_that_budget_alone() -> None:
    """A mean over budgets that are alike has the interval of one of them: problems, not answers, are drawn."""
    rng = random.Random(fresh_seed())
    texts = {name: "".join(rng.choice("k-") for _ in range(30)) for name in ("ours", "control")}

    def measured(settings: list[Setting]) -> tuple[dict[Setting, ByProblem], dict[Setting, dict[str, list[str]]]]:
        of = {setting: texts["control" if setting.policy == "random_attention" else "ours"] for setting in settings}
        return {s: samples("r" * 30) for s in settings}, {s: kept(text) for s, text in of.items()}

    pooled = pooled_rows("some", *measured([*OTHER, *DRAW]))[0]
    alone = accuracy_rows("some", *measured([OTHER[0], DRAW[0]]))[0]
    columns = [f"{name}{end}" for name in ("kept", "kept_less_control") for end in ("", "_low", "_high")]
    assert [pooled[name] for name in columns] == [alone[name] for name in columns]
