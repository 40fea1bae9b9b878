"""Random attention: a new draw at every compaction."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rkv_sglang.config import HEAD, REQUEST
from rkv_sglang.policies.base import Places, ScoreInputs
from rkv_sglang.policies.random import as_fraction, check_seed, mix_


@dataclass(frozen=True, kw_only=True)
class RandomAttention:
    """Random attention, arXiv 2609.03430: keep a uniform sample of what is held, drawn anew at every compaction.

    ``score_j = (m >> 8) / 2^24`` in [0, 1), where ``m`` starts as ``mix(j)`` and then becomes ``mix(m xor n)`` for
    ``n`` in turn the tokens seen so far, the number of the KV head in the whole model, the layer, and the seed; ``j``
    is the token's index among those held and ``mix`` that of policy ``random``. With one choice for the whole request
    head and layer are left out. The paper's window and buffer, 64, are the defaults.

    It reads neither queries nor keys.

    Attributes:
        seed: Chooses the sample, in [0, 2^32).
    """

    granularities: ClassVar[tuple[str, ...]] = (REQUEST, HEAD)
    default_window: ClassVar[int] = 64
    default_buffer: ClassVar[int] = 64

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        indices = torch.arange(num_tokens - inputs.queries.shape[0], device=inputs.keys.device)
        heads = torch.arange(num_kv_heads, device=indices.device) + inputs.first_kv_head
        # Filled where it is needed: a number that is brought there would be waited for.
        layer = torch.full((1,), inputs.layer, device=indices.device)
        drawn = mix_(mix_(indices) ^ (num_tokens + inputs.evicted_tokens))
        return self.of_heads(drawn.repeat(1, num_kv_heads, 1), layer, heads)[0]

    def score_places(self, places: Places) -> Tensor:
        """See ``Policy.score_places``."""
        return as_fraction(mix_(self.of_tokens(places) ^ self.seed))

    def of_tokens(self, places: Places) -> Tensor:
        """Return what tokens, and the tokens seen so far, make of the hash, ``[num_tokens]``, int64; a new tensor."""
        return mix_(mix_(places.indices.clone()) ^ places.logical_lens)

    def of_heads(self, hashed: Tensor, layers: Tensor, heads: Tensor) -> Tensor:
        """Return the scores of tokens in some layers and heads, ``[num_layers, num_heads, num_tokens]``, fp32.

        Args:
            hashed: ``of_tokens`` for every layer and head, ``[num_layers, num_heads, num_tokens]``; used up.
            layers, heads: Their numbers in the whole model, int64, on the device of ``hashed``.
        """
        hashed = mix_(hashed.bitwise_xor_(heads[:, None]))
        hashed = mix_(hashed.bitwise_xor_(layers[:, None, None]))
        return as_fraction(mix_(hashed.bitwise_xor_(self.seed)))
