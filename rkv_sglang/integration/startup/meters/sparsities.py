"""Sparsities of a model's attention, for the bounds between kinds of thoughts."""

from collections.abc import Sequence

import torch

from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.algorithm.modes import between_three_modes
from rkv_sglang.algorithm.thoughts import ONE_KIND, sparsities

# Steps that are looked at together.
STEPS = 64


class SparsityMeter:
    """The sparsity of every step of an answer, over the full cache, in the layers that are observed."""

    def __init__(self, layers: Sequence[int], num_kv_heads: int, negligible: float, model: ModelAttention) -> None:
        self.counts = dict.fromkeys(layers, 0)
        self._num_kv_heads, self._negligible, self._model = num_kv_heads, negligible, model
        self._prompt_len = 0
        # Of each prompt and answer, of each layer.
        self._of_layers: list[list[torch.Tensor]] = []

    def start(self, prompt_len: int) -> None:
        """See ``Meter``."""
        self._prompt_len = prompt_len
        self._of_layers.append([])

    def add(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """See ``Meter``."""
        if layer not in self.counts:
            return
        num_tokens = len(positions)
        by_head = keys[:num_tokens].reshape(num_tokens, self._num_kv_heads, -1)
        steps = queries[:num_tokens].reshape(num_tokens, -1, by_head.shape[2])
        found = [
            sparsities(steps[first:end], by_head[:end], self._negligible, self._model)
            for first in range(self._prompt_len, num_tokens, STEPS)
            for end in [min(first + STEPS, num_tokens)]
        ]
        self._of_layers[-1].append(torch.cat(found).double())
        self.counts[layer] += num_tokens

    def bounds(self) -> tuple[float, float]:
        """Return what lies between the three kinds of thoughts; ``ONE_KIND`` where there are not three."""
        samples = [torch.stack(of_layers).mean(dim=0) for of_layers in self._of_layers]
        return between_three_modes(torch.cat(samples)) or ONE_KIND
