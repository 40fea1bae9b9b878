"""Attention of a model, as far as a score must know it: what queries, keys and values do not tell."""

import math
from dataclasses import dataclass

from torch import Tensor

from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.algorithm.rope import Rope


@dataclass(frozen=True, kw_only=True)
class ModelAttention:
    """Facts about a model's attention; those of queries, keys and logits hold in all of its layers.

    Attributes:
        logit_scale: Factor of the products of queries and keys; None: ``1 / sqrt(head_dim)``.
        logit_cap: Above 0, logits are ``logit_cap * tanh(logit / logit_cap)``; 0: they are left as they are.
        rope: How positions turn queries and keys; None where they do not, or nobody has asked.
        statistics: Of the model's queries; None where nobody has asked for them.
        sliding_layers: Numbers of the layers that attend to the latest tokens alone. There the latest are kept,
            whatever they score: nothing else is ever attended to again.

    Raises:
        ValueError: A value is no finite number, the scale is not above 0 or the cap is below 0.
    """

    logit_scale: float | None = None
    logit_cap: float = 0.0
    rope: Rope | None = None
    statistics: QueryStatistics | None = None
    sliding_layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.logit_scale is not None and not 0.0 < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale must be a finite number above 0, got {self.logit_scale}")
        if not 0.0 <= self.logit_cap < math.inf:
            raise ValueError(f"logit_cap must be a finite number of at least 0, got {self.logit_cap}")

    def sliding_among(self, first_layer: int, num_layers: int) -> list[int]:
        """Return which of some layers in a row attend to the latest tokens alone, counted from the first of them."""
        return [layer for layer in range(num_layers) if first_layer + layer in self.sliding_layers]

    def scale_for(self, head_dim: int) -> float:
        """Return the factor of the products."""
        return 1.0 / math.sqrt(head_dim) if self.logit_scale is None else self.logit_scale

    def logits(self, products: Tensor, head_dim: int) -> Tensor:
        """Return the logits of products of queries and keys, of the same shape and dtype."""
        logits = products * self.scale_for(head_dim)
        return self.logit_cap * (logits / self.logit_cap).tanh() if self.logit_cap else logits


# What most models do.
PLAIN_ATTENTION = ModelAttention()
