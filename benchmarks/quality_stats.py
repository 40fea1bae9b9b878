"""The statistics of bench_quality, on plain numbers: intervals over prompts, repetition, divergence, compactions."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Estimate:
    """Return the mean over prompts and its 95 % percentile bootstrap interval; NaN without values.

    The prompts are drawn anew with replacement, 4000 times and with a fixed seed, so equal inputs give equal intervals.
    Steps or facts of one prompt depend on one another: average them first and give one value a prompt. With few
    prompts such an interval is too narrow, and if all values are equal it has no width.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        return Estimate(np.nan, np.nan, np.nan)
    draws = np.random.default_rng(0).integers(sample.size, size=(NUM_RESAMPLES, sample.size))
    means = sample[draws].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(sample.mean()), float(low), float(high))


def is_fresh(tokens: Sequence[int], order: int = 4) -> list[bool]:
    """Return for each token whether the n-gram of ``order`` tokens that it ends is new in the answer.

    The first tokens, which end no n-gram, count as fresh.
    """
    seen: set[tuple[int, ...]] = set()
    fresh = []
    for i in range(len(tokens)):
        gram = tuple(tokens[max(0, i - order + 1) : i + 1])
        fresh.append(len(gram) < order or gram not in seen)
        seen.add(gram)
    return fresh


def repetition_rate(tokens: Sequence[int], order: int = 4) -> float:
    """Return the share of the n-grams of ``order`` tokens that stood earlier in the same answer; 0 if there is none."""
    num_grams = len(tokens) - order + 1
    return is_fresh(tokens, order).count(False) / num_grams if num_grams > 0 else 0.0


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """Return the first index at which two answers differ, the length of the shorter one if they do not."""
    pairs = zip(tokens, reference, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(reference)))


def answer_length(preferred: Sequence[int], end_ids: Container[int]) -> int:
    """Return how many tokens come before the model first prefers to end its answer; all of them if it never does."""
    return next((i for i, token in enumerate(preferred) if token in end_ids), len(preferred))


def compactions_before(step: int, budget: int, buffer: int) -> int:
    """Return how many compactions lie before the forward pass that computes token ``step`` of an answer.

    Token 0 comes from the prompt. The pass of token ``step`` finds the KV of ``step - 1`` generated tokens, and a
    compaction precedes it whenever ``budget + buffer`` of them are resident. Holds for windows below that sum and
    requests that are not retracted; the benchmark compares it with the server's own count.
    """
    return max(0, (step - 1 - budget) // buffer)


def first_compacted_step(budget: int, buffer: int) -> int:
    """Return the first step whose forward pass reads a compacted cache."""
    return budget + buffer + 1


def interval_bins(most: int) -> list[tuple[int, int]]:
    """Return bins (least, most) of a count from 0 to ``most``: 0, 1, 2, then each twice as wide: 3-4, 5-8, 9-16, ..."""
    bins = [(0, 0), (1, 1), (2, 2)]
    while bins[-1][1] < most:
        end = bins[-1][1]
        bins.append((end + 1, 2 * end))
    return [(low, high) for low, high in bins if low <= most]
