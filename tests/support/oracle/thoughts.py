"""ThinKV's eviction from its definition, one number at a time in fp64: kinds, levels, and a k-means of real keys."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

EXECUTION, REASONING, TRANSITION = "execution", "reasoning", "transition"
# What matters least shrinks first.
LEAST_FIRST = (TRANSITION, EXECUTION, REASONING)


@dataclass
class Segment:
    """A stretch of generated tokens: its kind, how often it shrank, and how many of its candidates are held."""

    kind: str
    held: int
    level: int = 0
    is_gone: bool = False


@dataclass
class Request:
    """The segments of a request, the oldest first, and how near to another way any decision was.

    Attributes:
        doubts: Of each decision how far it was from another one, as a share of what was compared. Where that is about a
            rounding error, another right implementation may decide otherwise.
    """

    segments: list[Segment] = field(default_factory=list)
    doubts: list[float] = field(default_factory=list)

    def compact(self, kind: str, num_candidates: int, room: int, length: int) -> list[tuple[int, int]]:
        """Return of each segment how many of its tokens are held and how many of them its level allows."""
        sizes = [length]
        while sizes[-1] > 4:
            sizes.append(max(4, sizes[-1] // 2))

        def allowed(segment: Segment) -> int:
            return 0 if segment.is_gone else min(segment.held, sizes[segment.level])

        self.segments = [segment for segment in self.segments if segment.held > 0]
        new = []
        num_new = num_candidates - sum(segment.held for segment in self.segments)
        while num_new > 0:
            new.insert(0, Segment(REASONING, min(num_new, length)))
            num_new -= new[0].held
        new[-1].kind = kind
        self.segments += new
        for segment in self.segments:
            segment.is_gone = False
        if kind == TRANSITION:
            for segment in self.segments[:-1]:
                segment.level = min(segment.level + 1, len(sizes) - 1)

        def too_many() -> bool:
            return sum(map(allowed, self.segments)) > room

        for step in (self._shrink_one, self._drop_one):
            while too_many() and step(len(sizes) - 1):
                pass
        result = [(segment.held, allowed(segment)) for segment in self.segments]
        missing = room - sum(aim for _, aim in result)
        for segment, (held, aim) in reversed(list(zip(self.segments, result, strict=True))):
            segment.held = aim + min(held - aim, missing)
            missing -= segment.held - aim
        assert missing == 0
        return result

    def _shrink_one(self, last_level: int) -> bool:
        for kind in LEAST_FIRST:
            for segment in self.segments:
                if segment.kind == kind and segment.level < last_level:
                    segment.level += 1
                    return True
        return False

    def _drop_one(self, _: int) -> bool:
        for kind in LEAST_FIRST:
            for segment in self.segments:
                if segment.kind == kind and not segment.is_gone:
                    segment.is_gone = True
                    return True
        return False


def kind_of(sparsity: float, execution_up_to: float | None, transition_above: float | None) -> str:
    if execution_up_to is None or transition_above is None:
        return REASONING
    if sparsity > transition_above:
        return TRANSITION
    return EXECUTION if sparsity <= execution_up_to else REASONING


def sparsity_of_layer(
    queries: np.ndarray, keys: np.ndarray, negligible: float, logit: Callable[[float], float]
) -> float:
    """Return the mean over the window of the share of tokens that get next to no attention.

    Args:
        queries: ``[num_kv_heads, gqa_group_size, window, head_dim]``.
        keys: ``[num_kv_heads, L, head_dim]``.
        logit: Makes the logit of a product.
    """
    num_kv_heads, group_size, window, _ = queries.shape
    shares = []
    for t in range(window):
        num_seen = keys.shape[1] - window + t + 1
        total = np.zeros(num_seen)
        for head in range(num_kv_heads):
            products = np.stack([keys[head, :num_seen] @ queries[head, member, t] for member in range(group_size)])
            logits = np.array([logit(float(product)) for product in products.max(axis=0)])
            weights = np.exp(logits - logits.max())
            total += weights / weights.sum() / num_kv_heads
        shares.append(sum(float(weight) < negligible * float(total.max()) for weight in total) / num_seen)
    return sum(shares) / window


def chosen_of(
    points: Sequence[np.ndarray] | np.ndarray,
    held_and_aims: Sequence[tuple[int, int]],
    rounds: int,
    doubts: list[float],
) -> list[bool]:
    """Return which of the candidates of one head are chosen, segment by segment."""
    chosen: list[bool] = []
    for held, aim in held_and_aims:
        own = np.array(points[len(chosen) : len(chosen) + held])
        taken = range(held) if held <= aim else _representatives(own, aim, rounds, doubts)
        chosen += [index in taken for index in range(held)]
    return chosen


def _representatives(points: np.ndarray, count: int, rounds: int, doubts: list[float]) -> list[int]:
    if count == 0:
        return []
    scale = float(np.abs(points).max()) or 1.0

    def best(numbers: dict[int, float], of: Sequence[np.ndarray], *, largest: bool) -> int:
        """The first of the best; how much better it is than the next that is another point."""
        sign = 1 if largest else -1
        ranked = sorted(numbers, key=lambda index: (-sign * numbers[index], index))
        other = next((index for index in ranked if not np.array_equal(of[index], of[ranked[0]])), None)
        if other is not None:
            doubts.append(abs(numbers[ranked[0]] - numbers[other]) / scale)
        return ranked[0]

    mean = points.mean(axis=0)
    starts = [best({i: math.dist(point, mean) for i, point in enumerate(points)}, points, largest=True)]
    while len(starts) < count:
        left = [i for i in range(len(points)) if i not in starts]
        nearest = {i: min(math.dist(points[i], points[s]) for s in starts) for i in left}
        starts.append(best(nearest, points, largest=True))
    centroids = [points[start] for start in starts]
    for _ in range(rounds):
        joined: list[list[np.ndarray]] = [[] for _ in centroids]
        for point in points:
            distances = {c: math.dist(point, centroid) for c, centroid in enumerate(centroids)}
            joined[best(distances, centroids, largest=False)].append(point)
        centroids = [
            sum(members) / len(members) if members else points[start]
            for members, start in zip(joined, starts, strict=True)
        ]
    taken: list[int] = []
    for centroid in centroids:
        left = [i for i in range(len(points)) if i not in taken]
        distances = {i: math.dist(points[i], centroid) for i in left}
        # Two that joined one centroid are equally far from it.
        limit = min(distances.values()) * 1.001
        taken.append(next(i for i in left if distances[i] <= limit))
        doubts += [abs(distance - limit) / scale for distance in distances.values()] if limit > 0 else []
    return taken
