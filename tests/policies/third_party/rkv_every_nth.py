"""A policy of another package. It needs nothing of ``rkv_sglang``: a policy is a dataclass with a method ``score``."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class EveryNth:
    """Every ``stride``-th resident token comes before all others.

    Attributes:
        stride: Distance of the tokens that come first, in tokens.
        kernel_size: Does nothing; its name is that of a setting with another default.
    """

    stride: int
    kernel_size: int = 5

    def __post_init__(self):
        if self.stride < 1:
            raise ValueError(f"stride must be\nat least 1, got {self.stride}")

    def score(self, inputs):
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        indices = torch.arange(num_tokens - len(inputs.queries), device=inputs.keys.device)
        return (indices % self.stride == 0).float().repeat(num_kv_heads, 1)
