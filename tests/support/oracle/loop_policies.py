"""The score of every policy for one KV head, one number at a time in fp64, as its definition words it.

What a policy remembers is kept by logical position, so it cannot be mixed up when tokens move.
"""

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.support.oracle.loop_scores import loop_rkv_scores
from tests.support.oracle.thoughts import REASONING, Request, chosen_of

Vector = np.ndarray


@dataclass
class OneHead:
    """What one KV head of one layer holds.

    Attributes:
        keys: ``[L, head_dim]``, fp64.
        values: ``[L, v_head_dim]``, fp64.
        queries: Queries of the window by query head of the group, ``[gqa_group_size, window, head_dim]``, fp64.
        positions: Logical position of each token.
        received: Attention that the token of a position has received in all compactions before this one, or what else
            a policy remembers of it.
        prompt_len: Tokens of the prompt.
        budget: Generated tokens that are kept, the window included.
        layer, head: Their numbers in the model.
        usual: Of the group's usual queries, before their position turns them, the mean of each pair by head and the
            mean of its length; by how much a position turns each pair, and how much longer it becomes.
        beacons: Old queries of ``beaconkv`` by head of the group, before their position turned them; it brings them up
            to date.
        thoughts: For ``thinkv``, of each segment what is held and its level allows; empty: nothing was observed.
        doubts: It says here how far its decisions were from others.
        logit_scale, logit_cap: A logit is ``cap * tanh(scale * q . k / cap)``; no scale: 1 / sqrt(head_dim), no cap:
            ``scale * q . k``.
    """

    keys: Vector
    values: Vector
    queries: Vector
    positions: list[int]
    received: dict[int, float] = field(default_factory=dict)
    prompt_len: int = 0
    budget: int = 0
    layer: int = 0
    head: int = 0
    usual: tuple[Vector, Vector, list[float], float] | None = None
    beacons: list[list[Any]] = field(default_factory=list)
    thoughts: list[tuple[int, int]] = field(default_factory=list)
    doubts: list[float] = field(default_factory=list)
    logit_scale: float | None = None
    logit_cap: float | None = None

    def logit(self, product: float) -> float:
        scaled = product / math.sqrt(self.keys.shape[1]) if self.logit_scale is None else product * self.logit_scale
        return scaled if self.logit_cap is None else self.logit_cap * math.tanh(scaled / self.logit_cap)

    @property
    def num_scored(self) -> int:
        return len(self.keys) - self.queries.shape[1]


def loop_scores(policy: str, head: OneHead, **parameters: Any) -> list[float]:
    """Return the scores of the tokens before the window; ``h2o`` and ``gkv`` bring ``head.received`` up to date."""
    return _LOOPS[policy](head, **parameters)


def _softmax(numbers: list[float]) -> list[float]:
    largest = max(numbers)
    total = sum(math.exp(number - largest) for number in numbers)
    return [math.exp(number - largest) / total for number in numbers]


def _window_attention(head: OneHead) -> list[list[float]]:
    """Per window query, its attention to each token before the window."""
    group_size, window, _ = head.queries.shape
    rows = []
    for t in range(window):
        logits = []
        for j in range(head.num_scored):
            products = [float(head.queries[h, t] @ head.keys[j]) for h in range(group_size)]
            logits.append(head.logit(max(products)))
        rows.append(_softmax(logits))
    return rows


def _rkv(head: OneHead, *, mix_lambda: float, kernel_size: int, similarity_threshold: float) -> list[float]:
    return loop_rkv_scores(
        torch.from_numpy(head.keys),
        torch.from_numpy(head.queries),
        mix_lambda=mix_lambda,
        kernel_size=kernel_size,
        similarity_threshold=similarity_threshold,
        logit=head.logit,
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
    scores = []
    for j in range(head.num_scored):
        first = j - j % mean_tokens
        own = list(head.keys)[first : first + mean_tokens]
        difference = head.keys[j] - sum(own) / len(own)
        scores.append(math.sqrt(float(difference @ difference)))
    return scores


def _longflow(head: OneHead) -> list[float]:
    group_size = len(head.queries)
    scores = [0.0] * head.num_scored
    for h in range(group_size):
        attention = _softmax([head.logit(float(head.queries[h, -1] @ key)) for key in head.keys])
        for j in range(head.num_scored):
            scores[j] += attention[j] * sum(abs(float(number)) for number in head.values[j])
    return scores


def _gkv(
    head: OneHead, *, importance_weight: float, decay: float, kernel_size: int, similarity_threshold: float
) -> list[float]:
    group_size, window, _ = head.queries.shape
    shares = [0.0] * head.num_scored
    for t in range(window):
        rows = []
        for h in range(group_size):
            rows.append(
                _softmax([head.logit(float(head.queries[h, t] @ head.keys[j])) for j in range(head.num_scored)])
            )
        for j in range(head.num_scored):
            shares[j] += max(row[j] for row in rows) / window
    reach = kernel_size // 2
    pooled = [max(shares[max(0, j - reach) : j + reach + 1]) for j in range(head.num_scored)]
    redundancy = loop_rkv_scores(
        torch.from_numpy(head.keys),
        torch.from_numpy(head.queries),
        mix_lambda=0.0,
        kernel_size=1,
        similarity_threshold=similarity_threshold,
    ).redundancy
    scores = []
    for j in range(head.num_scored):
        fresh = pooled[j] / max(pooled)
        position = head.positions[j]
        # A prompt's tokens carry nothing: they are kept anyway.
        if position in head.received and j >= head.prompt_len:
            fresh = max(decay * head.received[position], fresh)
        head.received[position] = fresh
        scores.append(importance_weight * fresh - (1 - importance_weight) * redundancy[j] / max(redundancy))
    return scores


def _half(head: OneHead, *, mix_lambda: float, kernel_size: int, similarity_threshold: float, seed: int) -> list[float]:
    by_rkv = _rkv(head, mix_lambda=mix_lambda, kernel_size=kernel_size, similarity_threshold=similarity_threshold)
    logical_len = head.positions[-1] + 1
    scores = []
    for j in range(head.num_scored):
        number = _mix(j)
        for other in (logical_len, head.head, head.layer, seed):
            number = _mix(number ^ other)
        scores.append(math.floor(number / 2**8) / 2**24 if j >= head.prompt_len else 0.0)
    candidates = sorted(range(head.prompt_len, head.num_scored), key=lambda j: (-by_rkv[j], j))
    for j in candidates[: math.ceil((head.budget - head.queries.shape[1]) / 2)]:
        scores[j] = 2.0
    return scores


def _triattention(head: OneHead, **of_the_calibration: Any) -> list[float]:
    """As it was published: a sum over distances and pairs of what a query of so much later pays, angle by angle."""
    del of_the_calibration
    assert head.usual is not None
    means, lengths, inv_freqs, factor = head.usual
    logical_len = head.positions[-1] + 1
    distances = [2**power for power in range(13)]
    best = [-math.inf] * head.num_scored
    for h in range(len(means)):
        sums = []
        for j in range(head.num_scored):
            total = 0.0
            for f, inv_freq in enumerate(inv_freqs):
                # The cached key is turned by its position already, whichever that is.
                key = complex(head.keys[j][f], head.keys[j][f + len(inv_freqs)])
                mean, length = complex(means[h][f]), float(lengths[h][f])
                for distance in distances:
                    angle = inv_freq * (logical_len + distance) + cmath.phase(mean) - cmath.phase(key)
                    total += factor * abs(mean) * abs(key) * math.cos(angle) / len(distances)
                total += factor * (length - abs(mean)) * abs(key)
            sums.append(total)
        candidates = sums[head.prompt_len :]
        mean_sum = sum(candidates) / len(candidates)
        variance = sum((number - mean_sum) ** 2 for number in candidates) / len(candidates)
        deviation = max(math.sqrt(variance), 1e-6)
        for j in range(head.num_scored):
            best[j] = max(best[j], (sums[j] - mean_sum) / deviation)
    return best


def _beaconkv(head: OneHead, *, num_recent: int, num_beacons: int) -> list[float]:
    group_size, window, _ = head.queries.shape
    assert head.usual is not None
    _, _, inv_freqs, _ = head.usual
    logical_len = head.positions[-1] + 1

    def turn(vector: Vector, position: int) -> list[float]:
        turned = [float(number) for number in vector]
        pairs = len(inv_freqs)
        for f, inv_freq in enumerate(inv_freqs):
            pair = complex(turned[f], turned[f + pairs]) * cmath.exp(1j * inv_freq * position)
            turned[f], turned[f + pairs] = pair.real, pair.imag
        return turned

    for t in range(window):
        position = logical_len - window + t
        head.beacons.append([turn(head.queries[h, t], -position) for h in range(group_size)])
    points = [[number for query in point for number in query] for point in head.beacons]
    mean = [sum(column) / len(points) for column in zip(*points, strict=True)]
    chosen = [max(range(len(points)), key=lambda i: math.dist(points[i], mean))]
    while len(chosen) < min(num_beacons, len(points)):
        left = [i for i in range(len(points)) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(math.dist(points[i], points[c]) for c in chosen)))
    head.beacons[:] = [head.beacons[i] for i in sorted(chosen)]
    asking = [[turn(query, logical_len) for query in beacon] for beacon in head.beacons]
    asking += [[list(head.queries[h, t]) for h in range(group_size)] for t in range(window)][-num_recent:]
    best = [0.0] * head.num_scored
    for queries in asking:
        for query in queries:
            products = [
                sum(q * float(k) for q, k in zip(query, head.keys[j], strict=True)) for j in range(head.num_scored)
            ]
            attention = _softmax([head.logit(product) for product in products])
            best = [max(pair) for pair in zip(best, attention, strict=True)]
    return best


def _thinkv(head: OneHead, *, buffer: int, rounds: int, **of_the_observation: Any) -> list[float]:
    """What is chosen before all else, and of both the newest first."""
    del of_the_observation
    num_candidates, room = head.num_scored - head.prompt_len, head.budget - head.queries.shape[1]
    plan = head.thoughts or Request().compact(REASONING, num_candidates, room, buffer)
    chosen = chosen_of(head.keys[head.prompt_len : head.num_scored], plan, rounds, head.doubts)
    return [2.0**23 * is_chosen + j for j, is_chosen in enumerate([False] * head.prompt_len + chosen)]


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
    "gkv": _gkv,
    "half": _half,
    "beaconkv": _beaconkv,
    "triattention": _triattention,
    "random_attention": _random_attention,
    "thinkv": _thinkv,
}
