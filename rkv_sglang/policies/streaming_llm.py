"""StreamingLLM: keep the first tokens and the latest ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_sglang.policies.base import ScoreInputs
from rkv_sglang.policies.parameters import check_at_least


@dataclass(frozen=True, kw_only=True)
class StreamingLLM:
    """StreamingLLM, arXiv 2309.17453: attention sinks and recency, whatever the tokens are.

    ``score_j = j``, the index of the token; for the first ``num_sinks`` tokens of the request it is ``2 L - j``, above
    all others. A prompt of ``num_sinks`` tokens holds all sinks already. Resident indices serve as well as logical
    positions: they have the same order, and a sink is only ever evicted when the budget holds none but earlier sinks.

    Attributes:
        num_sinks: First tokens of the request that are kept before all others, 0 or more.
    """

    num_sinks: int = 4

    def __post_init__(self) -> None:
        check_at_least("num_sinks", self.num_sinks, 0)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        indices = torch.arange(num_tokens - inputs.queries.shape[0], device=inputs.keys.device)
        return self.of_places(indices, num_tokens).expand(num_kv_heads, -1)

    def of_places(self, indices: Tensor, num_tokens: Tensor | int) -> Tensor:
        """Return the scores of tokens by their index in a request of that many tokens, int64 to fp32."""
        return torch.where(indices < self.num_sinks, 2 * num_tokens - indices, indices).float()
