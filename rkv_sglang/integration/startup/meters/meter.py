"""Interfaces of whatever sees the queries and keys of prompts while a model is measured, and of what shows them."""

from typing import Any, Protocol

import torch


class Meter(Protocol):
    """Whatever looks at queries and keys of prompts.

    Attributes:
        counts: Tokens seen of each layer that it looks at.
    """

    counts: dict[int, int]

    def start(self, prompt_len: int) -> None:
        """Go on to the next prompt with its answer; ``prompt_len`` tokens are the prompt."""

    def add(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """Count one layer's queries and keys, both after RoPE, ``[num_tokens, num_heads * head_dim]``."""


class Metered(Protocol):
    """Whatever passes queries on to its meter, while it has one."""

    policy: Any
    meter: Meter | None
