"""The score of every policy for one KV head, one number at a time in fp64, as its definition words it.

What a policy remembers is kept by logical position, so it cannot be mixed up when tokens move.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.support.oracle.loop_scores import loop_rkv_scores

Vector = np.ndarray


@dataclass
class OneHead:
    """What one KV head of one layer holds.

    Attributes:
        keys: ``[L, head_dim]``, fp64.
        values: ``[L, v_head_dim]``, fp64.
        queries: Queries of the window by query head of the group, ``[gqa_group_size, window, head_dim]``, fp64.
        positions: Logical position of each token.
        received: Attention that the token of a position has received in all compactions before this one.
        layer, head: Their numbers.
    """

    keys: Vector
    values: Vector
    queries: Vector
    positions: list[int]
    received: dict[int, float] = field(default_factory=dict)
    layer: int = 0
    head: int = 0

    @property
    def num_scored(self) -> int:
        return len(self.keys) - self.queries.shape[1]


def loop_scores(policy: str, head: OneHead, **parameters: Any) -> list[float]:
    """Return the scores of the tokens before the window; ``h2o`` adds what they receive to ``head.received``."""
    return _LOOPS[policy](head, **parameters)


def _softmax(numbers: list[float]) -> list[float]:
    largest = max(numbers)
    total = sum(math.exp(number - largest) for number in numbers)
    return [math.exp(number - largest) / total for number in numbers]


def _window_attention(head: OneHead) -> list[list[float]]:
    """Per window query, its attention to each token before the window."""
    group_size, window, head_dim = head.queries.shape
    rows = []
    for t in range(window):
        logits = []
        for j in range(head.num_scored):
            products = [float(head.queries[h, t] @ head.keys[j]) for h in range(group_size)]
            logits.append(max(products) / math.sqrt(head_dim))
        rows.append(_softmax(logits))
    return rows


def _rkv(head: OneHead, *, mix_lambda: float, kernel_size: int, similarity_threshold: float) -> list[float]:
    return loop_rkv_scores(
        torch.from_numpy(head.keys),
        torch.from_numpy(head.queries),
        mix_lambda=mix_lambda,
        kernel_size=kernel_size,
        similarity_threshold=similarity_threshold,
    ).scores.tolist()


def _snapkv(head: OneHead, *, kernel_size: int) -> list[float]:
    rows = _window_attention(head)
    means = [sum(row[j] for row in rows) / len(rows) for j in range(head.num_scored)]
    pooled = []
    for j in range(head.num_scored):
        neighbours = range(j - kernel_size // 2, j + kernel_size // 2 + 1)
        pooled.append(max(means[i] for i in neighbours if 0 <= i < head.num_scored))
    return pooled


def _h2o(head: OneHead) -> list[float]:
    rows = _window_attention(head)
    scores = []
    for j in range(head.num_scored):
        position = head.positions[j]
        head.received[position] = head.received.get(position, 0.0) + sum(row[j] for row in rows)
        scores.append(head.received[position])
    return scores


def _streaming_llm(head: OneHead, *, num_sinks: int) -> list[float]:
    scores = []
    for j in range(head.num_scored):
        is_sink = head.positions[j] < num_sinks
        scores.append(2.0**24 - j if is_sink else float(j))
    return scores


def _keydiff(head: OneHead) -> list[float]:
    unit = [key / (math.sqrt(float(key @ key)) + 1e-8) for key in head.keys]
    mean = sum(unit) / len(unit)
    mean_norm = math.sqrt(float(mean @ mean)) + 1e-8
    return [-float(unit[j] @ mean) / mean_norm for j in range(head.num_scored)]


def _manifoldkv(head: OneHead, *, mean_tokens: int) -> list[float]:
    recent = list(head.keys)[-mean_tokens:]
    mean = sum(recent) / len(recent)
    return [math.sqrt(float((key - mean) @ (key - mean))) for key in head.keys[: head.num_scored]]


def _longflow(head: OneHead) -> list[float]:
    group_size, _, head_dim = head.queries.shape
    scores = [0.0] * head.num_scored
    for h in range(group_size):
        attention = _softmax([float(head.queries[h, -1] @ key) / math.sqrt(head_dim) for key in head.keys])
        for j in range(head.num_scored):
            scores[j] += attention[j] * sum(abs(float(number)) for number in head.values[j])
    return scores


def _mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    return x ^ (x >> 16)


def _random(head: OneHead, *, seed: int) -> list[float]:
    return [math.floor(_mix(_mix(position) ^ seed) / 2**8) / 2**24 for position in head.positions[: head.num_scored]]


def _random_attention(head: OneHead, *, seed: int) -> list[float]:
    num_seen = head.positions[-1] + 1
    draws = [_mix(_mix(j) ^ num_seen) for j in range(head.num_scored)]
    return [math.floor(_mix(_mix(_mix(m ^ head.head) ^ head.layer) ^ seed) / 2**8) / 2**24 for m in draws]


_LOOPS: dict[str, Callable[..., list[float]]] = {
    "rkv": _rkv,
    "snapkv": _snapkv,
    "h2o": _h2o,
    "streaming_llm": _streaming_llm,
    "keydiff": _keydiff,
    "manifoldkv": _manifoldkv,
    "longflow": _longflow,
    "random": _random,
    "random_attention": _random_attention,
}
