"""The R-KV score of one KV head once more, one number at a time in fp64: slow, and hard to get wrong twice alike."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoopScores:
    """Scores of the tokens before the window, ``[L - window]``, fp64, and how near a similarity is to the threshold.

    ``redundancy`` is that of all tokens, ``[L]``.
    """

    scores: torch.Tensor
    threshold_distance: float
    redundancy: list[float]


def loop_rkv_scores(
    keys: torch.Tensor,
    queries: torch.Tensor,
    *,
    mix_lambda: float,
    kernel_size: int,
    similarity_threshold: float,
    logit: Callable[[float], float] | None = None,
) -> LoopScores:
    """Score keys ``[L, head_dim]`` by the window queries of their group, ``[gqa_group_size, window, head_dim]``.

    ``logit`` makes a logit of a product; None divides it by the root of head_dim.
    """
    key_rows = keys.double().numpy()
    query_rows = queries.double().numpy()
    group_size, window, head_dim = query_rows.shape
    resident_len = len(key_rows)
    num_scored = resident_len - window
    to_logit = logit or (lambda product: product / math.sqrt(head_dim))

    attention_mean = [0.0] * num_scored
    for step in range(window):
        logits = [
            to_logit(max(float(query_rows[head, step] @ key) for head in range(group_size)))
            for key in key_rows[:num_scored]
        ]
        for j, weight in enumerate(_softmax(logits)):
            attention_mean[j] += weight / window
    reach = kernel_size // 2
    importance = [max(attention_mean[max(0, j - reach) : j + reach + 1]) for j in range(num_scored)]

    lengths = [math.sqrt(float(key @ key)) + 1e-8 for key in key_rows]
    column_sums = [0.0] * resident_len
    threshold_distance = math.inf
    for i in range(resident_len):
        row = [
            0.0 if i == j else float(key_rows[i] @ key_rows[j]) / (lengths[i] * lengths[j]) for j in range(resident_len)
        ]
        threshold_distance = min(threshold_distance, *(abs(value - similarity_threshold) for value in row))
        row[max((j for j in range(resident_len) if row[j] > similarity_threshold), default=0)] = 0.0
        for j, value in enumerate(row):
            column_sums[j] += value
    redundancy = _softmax([column_sum / resident_len for column_sum in column_sums])

    scores = [mix_lambda * importance[j] - (1 - mix_lambda) * redundancy[j] for j in range(num_scored)]
    return LoopScores(torch.tensor(scores, dtype=torch.float64), threshold_distance, redundancy)


def _softmax(values: list[float]) -> list[float]:
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    return [weight / sum(weights) for weight in weights]
