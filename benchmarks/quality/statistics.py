"""The statistics of answers, on plain numbers: repetition, divergence, length, the first compaction."""

from collections.abc import Container, Sequence


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
