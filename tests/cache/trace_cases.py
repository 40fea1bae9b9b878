"""Random histories of compactions, as lists of positions, and the traces they leave."""

import random
from dataclasses import dataclass, field

import numpy as np

from rkv_sglang.cache.trace import pack_compaction

Pair = tuple[int, int]


@dataclass
class History:
    """What every (layer, KV head) holds after each compaction, kept as plain lists while it happens.

    Attributes:
        compactions: What the recording has, in order.
        held: After each compaction, the generated positions that every pair holds, ascending.
        lengths: Generated tokens that had been in the cache by each compaction.
        starts: Numbers, from 0, of the compactions that were the first after the cache was computed (again).
    """

    num_layers: int
    num_kv_heads: int
    budget: int
    buffer: int
    num_tokens: int
    compactions: list[dict] = field(default_factory=list)
    held: list[dict[Pair, list[int]]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    @property
    def pairs(self) -> list[Pair]:
        return [(layer, head) for layer in range(self.num_layers) for head in range(self.num_kv_heads)]


def random_history(
    rng: random.Random,
    *,
    num_layers: int,
    num_kv_heads: int,
    budget: int,
    buffer: int,
    num_tokens: int,
    computed_again: tuple[int, ...] = (),
    always: int = 1,
) -> History:
    """Generate token by token; compact when a pair holds ``budget + buffer``; forget all evictions where asked.

    Args:
        computed_again: Lengths at which the request is preempted, after which every token is in the cache again.
        always: Most recent tokens that every pair keeps.
    """
    history = History(num_layers, num_kv_heads, budget, buffer, num_tokens)
    now: dict[Pair, list[int]] = {pair: [] for pair in history.pairs}
    fresh = True
    for length in range(1, num_tokens + 1):
        for positions in now.values():
            positions.append(length - 1)
        if length in computed_again:
            now = {pair: list(range(length)) for pair in history.pairs}
            fresh = True
        resident = len(now[0, 0])
        if resident >= budget + buffer:
            if fresh:
                history.starts.append(len(history.compactions))
                fresh = False
            rows = {pair: _choose(rng, resident, budget, always) for pair in history.pairs}
            kept = np.array([[rows[layer, head] for head in range(num_kv_heads)] for layer in range(num_layers)])
            history.compactions.append(pack_compaction(kept, resident_len=resident, evicted_before=length - resident))
            now = {pair: [now[pair][index] for index in rows[pair]] for pair in history.pairs}
            history.held.append({pair: list(positions) for pair, positions in now.items()})
            history.lengths.append(length)
    return history


def _choose(rng: random.Random, resident: int, budget: int, always: int) -> list[int]:
    older = range(resident - always)
    return [*sorted(rng.sample(older, budget - always)), *range(resident - always, resident)]
