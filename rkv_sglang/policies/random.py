"""Random: the control that every comparison needs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rkv_sglang.config import GRANULARITIES
from rkv_sglang.policies.base import Places, ScoreInputs
from rkv_sglang.policies.parameters import check_at_least

_LOW_32 = 0xFFFFFFFF
# Below 2^31, so that a product with a 32-bit number fits into int64.
MULTIPLIER = 0x45D9F3B


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
    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

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

    def score_places(self, places: Places) -> Tensor:
        """See ``Policy.score_places``."""
        return self.of_positions(places.indices + (places.logical_lens - places.kv_lens))

    def of_positions(self, positions: Tensor) -> Tensor:
        """Return the scores of tokens by their logical positions, int64 to fp32."""
        return as_fraction(mix_(mix_(positions.clone()) ^ self.seed))


def check_seed(seed: int) -> None:
    """Raise ``ValueError`` unless ``seed`` is a number of 32 bits."""
    check_at_least("seed", seed, 0)
    if seed > _LOW_32:
        raise ValueError(f"seed must be below 2^32, got {seed}")


def as_fraction(numbers: Tensor) -> Tensor:
    """Return 32-bit numbers held in int64 as fp32 in [0, 1), by their upper 24 bits."""
    return (numbers >> 8).float() / 2**24


def mix_(numbers: Tensor) -> Tensor:
    """Scramble 32-bit numbers held in int64, one to one, in place; one more tensor of their size is held meanwhile."""
    for _ in range(2):
        numbers.bitwise_xor_(numbers >> 16).mul_(MULTIPLIER).bitwise_and_(_LOW_32)
    return numbers.bitwise_xor_(numbers >> 16)
