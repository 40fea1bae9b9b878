"""ThinKV: keep reasoning longer than what carries it out, and of what is over a few keys that stand for the rest."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rkv_sglang.algorithm.centroids import nearest_to_centroids
from rkv_sglang.algorithm.thoughts import (
    AIM,
    HELD,
    ONE_KIND,
    REASONING,
    kind_of,
    next_table,
    sizes_of_levels,
    sparsities,
)
from rkv_sglang.policies.base import ScoreInputs
from rkv_sglang.policies.parameters import check_at_least, check_calibration, check_fraction

# Layers whose attention tells what kind of thought it is.
NUM_OBSERVED = 4
# A program of the kernel looks at a whole segment, and has no registers for a longer one.
MOST_IN_SEGMENT = 128


@dataclass(frozen=True, kw_only=True)
class ThinKV:
    """ThinKV, arXiv 2510.01290: eviction by kinds of thought, without its mixed precision.

    ``score_j = whether j stays``: it chooses instead of ranking. The tokens that came between two compactions are a
    segment. The window's queries, at its end, tell its kind by the sparsity s of their attention in 4 layers:
    execution up to one bound, transition above another, reasoning between them. Of a segment 128 tokens stay, or, each
    time that it shrinks, 64, 32, 16, 8, 4. A transition shrinks all earlier segments once; while there are too many
    tokens the oldest segment of the least important kind shrinks, transitions before execution before reasoning. Which
    tokens of a segment stay, each layer and KV head chooses: the real keys nearest to the centroids of a k-means, which
    starts from keys that lie far apart. What is missing to the budget is filled up with the newest of the others.

    s is the mean over the layers, and over the window's steps, of the share of tokens whose attention is below
    ``negligible`` times the largest; attention is the softmax of the largest logit of a query group, its mean over KV
    heads.

    Ours: levels of half the tokens for segments of another length; that a segment of which the kind was never measured,
    as those before the first compaction, counts as reasoning; that whole segments go, in the same order, where 4 of
    each are too many; that a key is taken once; the number of rounds.

    Attributes:
        buffer: Length of a segment, at most 128; the buffer of the server unless it is given.
        negligible: Share of the largest attention, in [0, 1].
        rounds: Rounds of the k-means, 0 or more.
        execution_up_to: Sparsity up to which a segment is execution; None, as the next: measured by the server.
        transition_above: Sparsity above which it is transition.
        statistics: Path of a file of both bounds; empty: the server makes one when it first starts with the model.
        questions: Questions that the model is asked for it, 1 to 32.
        answer_tokens: Length of each answer.
    """

    default_buffer: ClassVar[int] = 128

    buffer: int = 128
    negligible: float = 0.01
    rounds: int = 4
    execution_up_to: float | None = None
    transition_above: float | None = None
    statistics: str = ""
    questions: int = 32
    answer_tokens: int = 2048

    def __post_init__(self) -> None:
        check_at_least("buffer", self.buffer, 1)
        if self.buffer > MOST_IN_SEGMENT:
            raise ValueError(f"buffer must be at most {MOST_IN_SEGMENT}, the tokens of a segment, got {self.buffer}")
        check_at_least("rounds", self.rounds, 0)
        check_fraction("negligible", self.negligible)
        check_calibration(self.questions, self.answer_tokens)
        if (self.execution_up_to is None) != (self.transition_above is None):
            raise ValueError("execution_up_to and transition_above are two bounds of one measure: give both or none")
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"execution_up_to {low} must be a number of at most transition_above {high}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Both bounds; without any, everything is reasoning."""
        if self.execution_up_to is None or self.transition_above is None:
            return ONE_KIND
        return self.execution_up_to, self.transition_above

    def observed_layers(self, layers: Sequence[int]) -> list[int]:
        """See ``Policy``: 4 that lie evenly between the first and the last, or all."""
        count = min(NUM_OBSERVED, len(layers))
        return [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]

    def observed_numbers(self, budget: int, window: int) -> int:
        """See ``Policy``: five for each segment, of which there are no more than tokens."""
        return 5 * (budget - window + 1)

    def observe(self, layers: Iterable[ScoreInputs]) -> Tensor:
        """See ``Policy``: return the table of segments, ``[5, num_segments]``, int64."""
        sparse = []
        # One layer at a time is held.
        for own in layers:
            sparse.append(sparsities(own.queries, own.keys, self.negligible, own.model).mean())
            before, sizes = own.observed, _sizes(own)
        kind = kind_of(torch.stack(sparse).mean(), *self.bounds)
        return next_table(before, kind, *sizes, self.buffer)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        table = self.table_of(inputs.observed, *_sizes(inputs), inputs.keys.device)
        candidates = inputs.keys[inputs.prompt_len : len(inputs.keys) - len(inputs.queries)].transpose(0, 1)
        chosen = nearest_to_centroids(
            candidates,
            table[HELD],
            table[AIM],
            segment=self.buffer,
            most=max(sizes_of_levels(self.buffer)[1:], default=1),
            rounds=self.rounds,
        )
        return torch.cat([chosen.new_zeros(len(chosen), inputs.prompt_len), chosen], dim=1)

    def table_of(self, observed: Tensor | None, num_candidates: int, room: int, device: torch.device) -> Tensor:
        """Return what was observed, or a table of reasoning alone where nothing was."""
        if observed is not None:
            return observed
        kind = torch.full((), REASONING, device=device)
        return next_table(None, kind, num_candidates, room, self.buffer)


def _sizes(inputs: ScoreInputs) -> tuple[int, int]:
    """Return how many candidates there are, and how many of them stay."""
    if inputs.budget is None:
        raise ValueError("policy thinkv shares out a budget, and the inputs name none")
    window = len(inputs.queries)
    return len(inputs.keys) - window - inputs.prompt_len, inputs.budget - window
