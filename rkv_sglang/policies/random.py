"""Random: the control that every comparison needs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rkv_sglang.policies.base import ScoreInputs
from rkv_sglang.policies.parameters import check_at_least

_LOW_32 = 0xFFFFFFFF
# Below 2^31, so that a product with a 32-bit number fits into int64.
_MULTIPLIER = 0x45D9F3B


@dataclass(frozen=True, kw_only=True)
class Random:
    """The same number for the same token, whatever it is: a uniform sample of all tokens so far.

    ``score_j = (mix(mix(position_j) xor seed) >> 8) / 2^24``, in [0, 1), where ``position_j`` is the token's logical
    position and ``mix`` scrambles 32 bits: twice ``x = (x xor (x >> 16)) * 0x45d9f3b mod 2^32``, then
    ``x xor (x >> 16)``. All layers and heads keep the same tokens, whatever the tensor-parallel size. A kept token's
    score travels with it, because its resident index no longer tells its position.

    It reads neither queries nor keys.

    Attributes:
        seed: Chooses the sample, in [0, 2^32).
    """

    stateful: ClassVar[bool] = True

    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("seed", self.seed, 0)
        if self.seed > _LOW_32:
            raise ValueError(f"seed must be below 2^32, got {self.seed}")

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        indices = torch.arange(num_tokens - inputs.queries.shape[0], device=inputs.keys.device)
        # Right for the tokens that were never scored: what was evicted came before all of them.
        fresh = self.of_positions(indices + inputs.evicted_tokens).expand(num_kv_heads, -1)
        if inputs.state is None:
            return fresh
        scored_end = inputs.prompt_len + inputs.num_scored
        return torch.cat([fresh[:, : inputs.prompt_len], inputs.state, fresh[:, scored_end:]], dim=1)

    def of_positions(self, positions: Tensor) -> Tensor:
        """Return the scores of tokens by their logical positions, int64 to fp32."""
        return (_mix(_mix(positions) ^ self.seed) >> 8).float() / 2**24


def _mix(numbers: Tensor) -> Tensor:
    """Scramble 32-bit numbers held in int64, one to one."""
    for _ in range(2):
        numbers = ((numbers ^ (numbers >> 16)) * _MULTIPLIER) & _LOW_32
    return numbers ^ (numbers >> 16)
