"""H2O: keep what has received the most attention so far."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rkv_sglang.algorithm.scoring import importance
from rkv_sglang.config import GRANULARITIES
from rkv_sglang.policies.base import ScoreInputs


@dataclass(frozen=True, kw_only=True)
class H2O:
    """H2O, heavy hitters, arXiv 2306.14048: attention received, summed over the windows of all compactions.

    ``score_j = score_j at the last compaction + sum over t of p[t, j]``, where ``p[t, :]`` is the softmax over all
    tokens before the window of the model's logits of ``max over the query group of q_t . k_j``, for the queries t of
    the window. A token that was never scored starts from 0. The sum travels with the token: one float per token and
    head.

    It has no parameters.
    """

    stateful: ClassVar[bool] = True
    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        received = importance(inputs.queries, inputs.keys, kernel_size=1, model=inputs.model)
        received *= inputs.queries.shape[0]
        if inputs.state is not None:
            received[:, inputs.prompt_len : inputs.prompt_len + inputs.num_scored] += inputs.state
        return received
