"""From finished samples to one row a setting: plain arithmetic, no server."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.accuracy.checker import NEITHER, UNJUDGED
from benchmarks.accuracy.kept import Comparisons, is_kept
from benchmarks.accuracy.store import Sample
from benchmarks.common.schema import Row
from benchmarks.common.settings import Setting, without_sizes
from benchmarks.common.statistics import Estimate, mean_interval
from rkv_sglang.config import NO_POLICY

NOTHING_COMPRESSED = "no sample was long enough to be compressed: the row says nothing about the policy"
PARTLY_COMPRESSED = "fewer than half of the samples were compressed"

# What a policy must beat: a draw of the same budget.
CONTROL = "random_attention"

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
    return mean_interval([] if not theirs else [a - b for a, b in zip(ours, theirs, strict=True)])


def kept_shares(comparisons: Comparisons) -> list[float]:
    """Return for each problem the share of its samples that keep the full cache's answer; see ``kept.is_kept``."""
    return [statistics.mean(map(is_kept, of_one)) for of_one in comparisons.values()]


def held_share(samples: Iterable[Sample]) -> float:
    """Return the share of all generated tokens that were still held when their answer ended."""
    samples = list(samples)
    generated = sum(sample.output_tokens for sample in samples)
    return 1 - sum(sample.evicted_tokens for sample in samples) / generated


def accuracy_rows(
    dataset: str,
    results: Mapping[Setting, ByProblem],
    kept: Mapping[Setting, Comparisons] | None = None,
    named_control: str = "",
) -> list[Row]:
    """Return one row a setting; all settings have the same problems, in the same order.

    Args:
        kept: Of every setting, how its answers compare with the full cache's; None without a setting none.
        named_control: What every setting is held against; see ``control_of``.
    """
    kept = kept or {}
    full = next((by for setting, by in results.items() if setting.policy == NO_POLICY), None)
    rows = []
    for setting, by_problem in results.items():
        control = control_of(setting, list(results), named_control)
        right, shares = pass_at_1(by_problem), kept_shares(kept[setting]) if setting in kept else []
        rows.append(
            {
                **_row(dataset, setting, by_problem, full),
                "control": control.name if control else "",
                **columns("pass_less_control", paired(right, control and pass_at_1(results[control])), 4),
                **columns("kept", mean_interval(shares), 4),
                "kept_neither": _share(kept.get(setting), NEITHER),
                "not_compared": _share(kept.get(setting), UNJUDGED),
                **columns("kept_less_control", paired(shares, control and shares and kept_shares(kept[control])), 4),
            }
        )
    return rows


def control_of(setting: Setting, settings: Sequence[Setting], named: str = "") -> Setting | None:
    """Return what a setting is held against, None if there is no such setting.

    Args:
        named: A setting by name, or a variant (``without_sizes``), of which it is the one with the same budget and
            buffer. Empty: that of ``CONTROL`` with its budget that is nearest to it (``unlikeness``).
    """
    if named:
        sizes = (setting.budget, setting.buffer)
        variant = (s for s in settings if without_sizes(s.name) == named and (s.budget, s.buffer) == sizes)
        return next((s for s in settings if s.name == named), None) or next(variant, None)
    if setting.config is None:
        return None
    of_budget = [other for other in settings if other.policy == CONTROL and other.budget == setting.budget]
    return min(of_budget, key=lambda other: unlikeness(setting, other), default=None)


def unlikeness(setting: Setting, control: Setting) -> tuple[bool, bool]:
    """Return how unlike a control is, to be compared: in granularity, and in the latest tokens that are always kept."""
    ours, its = setting.config, control.config
    assert ours is not None and its is not None
    return ours.granularity != its.granularity, ours.window != its.window


def _share(comparisons: Comparisons | None, wanted: str) -> float:
    if comparisons is None:
        return math.nan
    return round(statistics.mean(c == wanted for of_one in comparisons.values() for c in of_one), 4)


def _row(dataset: str, setting: Setting, by_problem: ByProblem, full: ByProblem | None) -> Row:
    samples = [sample for of_one in by_problem.values() for sample in of_one]
    tokens = [sample.output_tokens for sample in samples]
    seconds, devices = busy_seconds(samples), samples[0].devices
    compressed = statistics.mean(sample.compactions > 0 for sample in samples)
    is_full = setting.policy == NO_POLICY
    return {
        "dataset": dataset,
        "setting": setting.name,
        "policy": setting.policy,
        "budget": setting.budget,
        "buffer": setting.buffer,
        "problems": len(by_problem),
        "samples": len(samples) // len(by_problem),
        **columns("pass_at_1", mean_interval(pass_at_1(by_problem)), 4),
        "no_answer": round(statistics.mean(sample.outcome == "none" for sample in samples), 4),
        "unjudged": round(statistics.mean(sample.outcome == UNJUDGED for sample in samples), 4),
        "tokens_mean": round(statistics.mean(tokens), 1),
        "tokens_median": float(statistics.median(tokens)),
        "truncated": round(statistics.mean(sample.truncated for sample in samples), 4),
        "compressed": round(compressed, 4),
        "compactions": round(statistics.mean(sample.compactions for sample in samples), 3),
        "held": round(held_share(samples), 4),
        "seconds": round(seconds, 2),
        "devices": devices,
        "correct_per_hour": round(sum(s.outcome == "right" for s in samples) * 3600 / (seconds * devices), 3),
        **columns("pass_diff", paired(pass_at_1(by_problem), full and pass_at_1(full)), 4),
        **columns("tokens_diff", paired(_mean_tokens(by_problem), full and _mean_tokens(full)), 1),
        "note": _note(samples, "" if is_full or compressed >= 0.5 else _little(compressed)),
    }


def _little(compressed: float) -> str:
    return PARTLY_COMPRESSED if compressed else NOTHING_COMPRESSED


def _note(samples: Sequence[Sample], note: str) -> str:
    unjudged = sum(sample.outcome == UNJUDGED for sample in samples)
    return "; ".join(filter(None, [note, f"{unjudged} samples could not be judged" if unjudged else ""]))


def _mean_tokens(by_problem: ByProblem) -> list[float]:
    return [statistics.mean(sample.output_tokens for sample in samples) for samples in by_problem.values()]


def columns(name: str, estimate: Estimate, digits: int) -> dict[str, float]:
    """Return an estimate as the three columns of a table: ``name``, and with ``_low`` and ``_high`` behind it."""
    return {
        name: round(estimate.mean, digits),
        f"{name}_low": round(estimate.low, digits),
        f"{name}_high": round(estimate.high, digits),
    }
