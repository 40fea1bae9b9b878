"""What several benchmarks count with: means with intervals, and how often a request is compacted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def slope_interval(xs: Sequence[float], ys: Sequence[float]) -> Estimate:
    """Return the slope of the least-squares line and its 95 % percentile bootstrap interval; NaN of under three points
    or of a single x.

    The points are drawn anew with replacement, 4000 times and with a fixed seed; draws of a single x have no slope and
    are left out.
    """
    x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if x.size < 3 or np.ptp(x) == 0:
        return Estimate(np.nan, np.nan, np.nan)
    draws = np.random.default_rng(0).integers(x.size, size=(NUM_RESAMPLES, x.size))
    slopes = np.array([_slope(x[draw], y[draw]) for draw in draws])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(slopes, [tail, 1 - tail])
    return Estimate(float(_slope(x, y)), float(low), float(high))


def _slope(x: "np.ndarray[Any, Any]", y: "np.ndarray[Any, Any]") -> float:
    centred = x - x.mean()
    square = float(centred @ centred)
    return float(centred @ (y - y.mean())) / square if square > 0 else float("nan")


def compactions_before(step: int, budget: int, buffer: int) -> int:
    """Return how many compactions lie before the forward pass that computes token ``step`` of an answer.

    Token 0 comes from the prompt. The pass of token ``step`` finds the KV of ``step - 1`` generated tokens, and a
    compaction precedes it whenever ``budget + buffer`` of them are resident. Holds for windows below that sum and
    requests that are not retracted; the benchmark compares it with the server's own count.
    """
    return max(0, (step - 1 - budget) // buffer)
