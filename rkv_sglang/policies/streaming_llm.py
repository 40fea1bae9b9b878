"""StreamingLLM: keep the first tokens and the latest ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rkv_sglang.config import GRANULARITIES
from rkv_sglang.policies.base import Places, ScoreInputs
from rkv_sglang.policies.parameters import check_at_least


@dataclass(frozen=True, kw_only=True)
class StreamingLLM:
    """StreamingLLM, arXiv 2309.17453: attention sinks and recency, whatever the tokens are.

    ``score_j = j``, the index of the token; for the first ``num_sinks`` tokens of the request it is ``2^24 - j``, above
    all others, and so is the mean of a block that has some of them. A prompt of ``num_sinks`` tokens holds all sinks
    already. Resident indices serve as well as logical positions: they have the same order, and a sink is only ever
    evicted when the budget holds none but earlier sinks.

    Attributes:
        num_sinks: First tokens of the request that are kept before all others, 0 or more.
    """

    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES

    num_sinks: int = 4

    def __post_init__(self) -> None:
        check_at_least("num_sinks", self.num_sinks, 0)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        indices = torch.arange(num_tokens - inputs.queries.shape[0], device=inputs.keys.device)
        return self.of_indices(indices).expand(num_kv_heads, -1)

    def score_places(self, places: Places) -> Tensor:
        """See ``Policy.score_places``."""
        return self.of_indices(places.indices)

    def of_indices(self, indices: Tensor) -> Tensor:
        """Return the scores of tokens by their index in a request, int64 to fp32."""
        return torch.where(indices < self.num_sinks, 2**24 - indices, indices).float()
