"""Layers that attend to the latest tokens alone: how many these are, and which settings keep as many.

A layer's window counts the entries of a request's row. What is kept lies at its end, so as long as all of the latest
tokens that the window takes in are kept, it takes in just these.
"""

from collections.abc import Iterable
from typing import Any

from rkv_sglang.config import HEAD, PolicyConfig


def attention_window(layers: Iterable[Any]) -> int:
    """Return the most tokens, its own included, to which a token attends in such layers; 0 if none of them is one.

    Args:
        layers: SGLang's ``RadixAttention``, whose ``sliding_window_size`` does not count a token's own entry.
    """
    return max((layer.sliding_window_size + 1 for layer in layers if layer.sliding_window_size > 0), default=0)


def latest_kept(config: PolicyConfig) -> tuple[str, int]:
    """Return how many of a request's latest tokens stay in such a layer, and the flag that says so."""
    return ("--kv-budget", config.budget) if config.granularity == HEAD else ("--kv-window", config.window)
