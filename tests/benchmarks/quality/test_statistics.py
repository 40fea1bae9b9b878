"""Statistics of benchmarks against values worked out by hand."""

import math
import random

import numpy as np
import pytest

from benchmarks.common.statistics import compactions_before, mean_interval
from benchmarks.quality.statistics import (
    answer_length,
    first_compacted_step,
    first_divergence,
    interval_bins,
    is_fresh,
    repetition_rate,
)


def test_an_interval_of_equal_values_has_no_width() -> None:
    estimate = mean_interval([0.25] * 7)
    assert (estimate.mean, estimate.low, estimate.high) == (0.25, 0.25, 0.25)


def test_an_interval_of_two_values_spans_both() -> None:
    # Resampled means of 0 and 1 are 0, 0.5 and 1 with chances 1/4, 1/2 and 1/4: both tails reach the ends.
    estimate = mean_interval([0.0, 1.0])
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, 0.0, 1.0)


def test_an_interval_of_many_values_is_the_normal_one(rng: random.Random) -> None:
    values = [rng.gauss(3, 2) for _ in range(400)]
    half = 1.96 * float(np.std(values)) / math.sqrt(len(values))
    estimate = mean_interval(values)
    assert estimate.mean == pytest.approx(sum(values) / 400)
    assert estimate.low == pytest.approx(estimate.mean - half, abs=half / 8)
    assert estimate.high == pytest.approx(estimate.mean + half, abs=half / 8)


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).normal(size=(300, 32))
    held = sum(estimate.low <= 0 <= estimate.high for estimate in map(mean_interval, draws.tolist()))
    # 95 % nominal; the percentile bootstrap of 32 values is known to fall a little short.
    assert 0.88 <= held / 300 <= 0.98


def test_an_interval_of_nothing_is_nan_and_equal_inputs_give_equal_intervals() -> None:
    assert math.isnan(mean_interval([]).mean)
    assert mean_interval([1, 5, 2]) == mean_interval([1, 5, 2])


def test_repetition_counts_ngrams_seen_before() -> None:
    # 1212121: 4-grams 1212 2121 1212 2121; the last two were there before.
    assert repetition_rate([1, 2, 1, 2, 1, 2, 1]) == 0.5
    assert repetition_rate([1, 2, 3, 4, 5, 6]) == 0
    assert repetition_rate([7] * 9) == pytest.approx(5 / 6)
    assert repetition_rate([7, 7, 7]) == 0
    assert repetition_rate([7, 7, 7], order=2) == 0.5
    assert repetition_rate([]) == 0


def test_fresh_tokens_end_a_new_ngram() -> None:
    # Pairs: -, 12, 21, 12 (again), 23, 31, 12 (again).
    assert is_fresh([1, 2, 1, 2, 3, 1, 2], order=2) == [True, True, True, False, True, True, False]


def test_divergence_is_the_first_different_token() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 4]) == 2
    assert first_divergence([1, 2, 3], [9, 2, 3]) == 0
    assert first_divergence([1, 2, 3], [1, 2, 3]) == 3
    assert first_divergence([1, 2], [1, 2, 3]) == 2


def test_an_answer_ends_where_its_end_is_first_preferred() -> None:
    assert answer_length([5, 6, 2, 7, 0], {0, 2}) == 2
    assert answer_length([5, 6], {0, 2}) == 2
    assert answer_length([0, 6], [0]) == 0


def simulated_compactions(step: int, budget: int, buffer: int) -> int:
    """Count literally: each pass after the prompt's first compacts if due, then adds its token's KV."""
    resident = count = 0
    for _ in range(step):
        if resident == budget + buffer:
            resident, count = budget, count + 1
        resident += 1
    return count


def test_compactions_are_counted_as_they_happen() -> None:
    for budget, buffer in ((64, 16), (9, 1), (10, 3), (24, 24)):
        counts = [compactions_before(step, budget, buffer) for step in range(160)]
        assert counts == [simulated_compactions(step, budget, buffer) for step in range(160)]
        assert counts.index(1) == first_compacted_step(budget, buffer)


def test_bins_cover_every_count_once() -> None:
    assert interval_bins(0) == [(0, 0)]
    assert interval_bins(3) == [(0, 0), (1, 1), (2, 2), (3, 4)]
    assert interval_bins(17) == [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]
    for most in range(40):
        covered = [count for low, high in interval_bins(most) for count in range(low, high + 1)]
        assert covered == list(range(len(covered))) and most in covered
