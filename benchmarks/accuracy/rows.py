"""From finished samples to one row a setting: plain arithmetic, no server."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.accuracy.checker import UNJUDGED
from benchmarks.accuracy.store import Sample
from benchmarks.common.schema import Row
from benchmarks.common.settings import Setting
from benchmarks.common.statistics import Estimate, mean_interval
from rkv_sglang.config import NO_POLICY

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
        "unjudged": round(statistics.mean(sample.outcome == UNJUDGED for sample in samples), 4),
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
        "note": _note(samples, "" if is_baseline or compressed >= 0.5 else _little(compressed)),
    }


def _little(compressed: float) -> str:
    return PARTLY_COMPRESSED if compressed else NOTHING_COMPRESSED


def _note(samples: Sequence[Sample], note: str) -> str:
    unjudged = sum(sample.outcome == UNJUDGED for sample in samples)
    return "; ".join(filter(None, [note, f"{unjudged} samples could not be judged" if unjudged else ""]))


def _mean_tokens(by_problem: ByProblem) -> list[float]:
    return [statistics.mean(sample.output_tokens for sample in samples) for samples in by_problem.values()]


def _columns(name: str, estimate: Estimate, digits: int) -> dict[str, float]:
    return {
        name: round(estimate.mean, digits),
        f"{name}_low": round(estimate.low, digits),
        f"{name}_high": round(estimate.high, digits),
    }
