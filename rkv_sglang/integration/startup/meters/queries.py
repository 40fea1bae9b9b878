"""Sums of a model's queries, for the statistics of ``QueryStatistics``."""

import torch

from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.algorithm.rope import Rope


class QueryMeter:
    """Sums of queries that were turned back to position 0."""

    def __init__(self, rope: Rope, num_layers: int, num_qo_heads: int, device: torch.device | str) -> None:
        self.rope = rope
        self.counts = dict.fromkeys(range(num_layers), 0)
        shape = (num_layers, num_qo_heads, rope.num_pairs)
        self._sums = torch.zeros(shape, dtype=torch.complex128, device=device)
        self._lengths = torch.zeros(shape, dtype=torch.float64, device=device)

    def start(self, prompt_len: int) -> None:
        """See ``Meter``: all tokens count."""

    def add(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """See ``Meter``."""
        num_tokens = len(positions)
        pairs = self.rope.pairs(queries[:num_tokens].reshape(num_tokens, self._sums.shape[1], -1))
        turned_back = self.rope.turns(positions.tolist()).conj().to(queries.device)
        pairs = pairs.to(torch.complex128) * turned_back[:, None] / self.rope.factor
        self._sums[layer] += pairs.sum(dim=0)
        self._lengths[layer] += pairs.abs().sum(dim=0)
        self.counts[layer] += num_tokens

    def statistics(self) -> QueryStatistics:
        """Return the means so far."""
        counts = torch.tensor([*self.counts.values()], dtype=torch.float64, device=self._lengths.device)[:, None, None]
        return QueryStatistics((self._sums / counts).to(torch.complex64), (self._lengths / counts).float())
