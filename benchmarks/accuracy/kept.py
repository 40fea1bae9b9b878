"""Does a setting keep the answer that the full cache gives? For every problem, whether that answer is right or not."""

from collections.abc import Mapping, Sequence

from benchmarks.accuracy.checker import MOST_FOUND, NEITHER, SAME
from benchmarks.accuracy.judge import Judge
from benchmarks.accuracy.store import Sample

# Of each sample of each problem: same, other, neither or unjudged; see ``checker.compare``.
Comparisons = Mapping[str, Sequence[str]]


def compare_answers(
    judge: Judge, by_problem: Mapping[str, Sequence[Sample]], full: Mapping[str, Sequence[Sample]]
) -> Comparisons:
    """Compare each sample with the full cache's sample of the same number, which has the same seed.

    Meant for greedy answers: of two that are drawn, also the full cache's own differ.

    Args:
        by_problem: The samples of a setting.
        full: Those of the full cache, as many of the same problems.
    """
    return {
        key: [_compare(judge, sample, other) for sample, other in zip(samples, full[key], strict=True)]
        for key, samples in by_problem.items()
    }


def is_kept(comparison: str) -> bool:
    """Return whether an answer counts as kept: none is kept by none, and what could not be compared in time is not."""
    return comparison in (SAME, NEITHER)


def _compare(judge: Judge, sample: Sample, other: Sample) -> str:
    # No library is needed for answers that never met a compaction, and for half of the others.
    if (sample.text, sample.truncated) == (other.text, other.truncated):
        return NEITHER if sample.outcome == "none" else SAME
    if sample.found and sample.found == other.found and len(sample.found) < MOST_FOUND:
        return SAME
    return judge.compare(sample.text, sample.truncated, other.text, other.truncated)
