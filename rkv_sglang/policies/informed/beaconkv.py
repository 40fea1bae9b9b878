"""BeaconKV: keep what recent queries attend to, and what a few old ones that differ most would attend to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rkv_sglang.algorithm.rope import Rope
from rkv_sglang.algorithm.validation import check_keys, check_queries
from rkv_sglang.policies.base import Scored, ScoreInputs
from rkv_sglang.policies.parameters import check_at_least

# Queries that a program of the kernel looks at: recent ones and beacons together.
MOST_QUERIES = 64


@dataclass(frozen=True, kw_only=True)
class BeaconKV:
    """BeaconKV, arXiv 2609.04971: the attention of recent queries, and of beacons, old queries that lie far apart.

    ``score_j = max over the last num_recent queries and the beacons, and over the query group, of a[t, j]``, where
    ``a[t, :]`` is the softmax over all tokens before the window of the model's logits. Beacons are turned to the
    position of the next token. At each compaction, before anything is scored, they are chosen anew among those of the
    compaction before and the window's queries, all turned back to position 0: first the one farthest from their mean,
    then again and again the one farthest from those chosen, by the Euclidean distance of all heads of the query group
    together. How many there are and when they are chosen is our choice, since the paper does not tell.

    Attributes:
        num_recent: Most recent queries that count as they are, 1 or more; no more than the window has.
        num_beacons: Old queries that are kept, 1 or more; with the recent ones at most 64.
    """

    remembers: ClassVar[bool] = True
    needs_rope: ClassVar[bool] = True

    num_recent: int = 4
    num_beacons: int = 28

    def __post_init__(self) -> None:
        check_at_least("num_recent", self.num_recent, 1)
        check_at_least("num_beacons", self.num_beacons, 1)
        if self.num_recent + self.num_beacons > MOST_QUERIES:
            raise ValueError(
                f"num_recent {self.num_recent} and num_beacons {self.num_beacons} are together more than {MOST_QUERIES}"
            )

    def memory_numbers(self, gqa_group_size: int, head_dim: int) -> int:
        """See ``Policy``."""
        return self.num_beacons * gqa_group_size * head_dim

    def score(self, inputs: ScoreInputs) -> Scored:
        """See ``Policy.score``."""
        check_keys(inputs.keys)
        check_queries(inputs.queries, inputs.keys)
        rope = inputs.model.rope
        if rope is None:
            raise ValueError("policy beaconkv needs the model's rotary positions")
        num_tokens, num_kv_heads, head_dim = inputs.keys.shape
        window = len(inputs.queries)
        logical_len = num_tokens + inputs.evicted_tokens
        # [num_kv_heads, window, gqa_group_size, head_dim]
        grouped = torch.unflatten(inputs.queries, 1, (num_kv_heads, -1)).transpose(0, 1)
        still = turned(rope, grouped, range(logical_len - window, logical_len), back=True).to(grouped.dtype)
        known = still if inputs.memory is None else torch.cat([inputs.memory.to(still), still], dim=1)
        beacons = known.take_along_dim(farthest(known.flatten(2), self.num_beacons)[:, :, None, None], dim=1)
        ahead = turned(rope, beacons, [logical_len] * beacons.shape[1]).to(grouped.dtype)
        asking = torch.cat([ahead, grouped[:, -self.num_recent :]], dim=1).float().flatten(1, 2)
        earlier = inputs.keys[: num_tokens - window].permute(1, 2, 0).float()
        scores = inputs.model.logits(asking @ earlier, head_dim).softmax(dim=2).amax(dim=1)
        return Scored(scores, scores, beacons)


def turned(rope: Rope, vectors: Tensor, positions: range | list[int], *, back: bool = False) -> Tensor:
    """Return vectors turned by their positions, or turned back; fp32, a copy.

    Args:
        vectors: ``[num_kv_heads, num_positions, gqa_group_size, head_dim]``.
    """
    turns = rope.turns_on(positions, vectors.device)[:, None]
    return rope.with_pairs(vectors, rope.pairs(vectors) * (turns.conj() if back else turns))


def farthest(points: Tensor, count: int) -> Tensor:
    """Return which points of each head are chosen, ascending, ``[num_kv_heads, min(count, num_points)]``, int64.

    Args:
        points: ``[num_kv_heads, num_points, num_dims]``, floating.
    """
    points = points.float()
    num_heads, num_points, _ = points.shape
    heads = torch.arange(num_heads, device=points.device)
    apart = (points[:, :, None] - points[:, None]).square().sum(dim=3)
    nearest = (points - points.mean(dim=1, keepdim=True)).square().sum(dim=2)
    chosen = torch.zeros(num_heads, num_points, dtype=torch.bool, device=points.device)
    for step in range(min(count, num_points)):
        best = nearest.masked_fill(chosen, -1.0).argmax(dim=1)
        chosen[heads, best] = True
        nearest = apart[heads, best] if step == 0 else torch.minimum(nearest, apart[heads, best])
    return chosen.nonzero()[:, 1].view(num_heads, -1)
