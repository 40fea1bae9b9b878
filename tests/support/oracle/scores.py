"""The R-KV score (arXiv 2505.24133), with the similarity matrix written out in full."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ScoreInputs:
    """What a policy may look at: one request, one layer, all KV heads, ``L`` resident tokens in temporal order.

    Attributes:
        keys: As cached (after RoPE and any key norm), ``[num_kv_heads, L, head_dim]``, fp32.
        values: ``[num_kv_heads, L, head_dim]``, fp32.
        window_queries: Queries (after RoPE and any query norm) of the last ``window`` tokens,
            ``[num_qo_heads, window, head_dim]``, fp32; query heads of one KV head are neighbours.
        positions: Logical position of each resident token, ``[num_kv_heads, L]``, int64.
        prompt_len: Leading tokens that cannot be dropped.
        memory: One number for every logical position, ``[num_kv_heads, capacity]``, fp32, 0 after a prefill. A policy
            with a memory reads and writes it; nothing else does.
        layer: Number of the layer.
        logit_scale: Factor of the products of queries and keys; None: ``head_dim ** -0.5``.
        budget: Generated tokens that are kept, the window included.
        beacons: What ``beaconkv`` remembers of this layer, at the most one tensor; it brings it up to date. Of
            ``thinkv`` the request's segments and what each may keep, the same in all layers.
    """

    keys: torch.Tensor
    values: torch.Tensor
    window_queries: torch.Tensor
    positions: torch.Tensor
    prompt_len: int
    memory: torch.Tensor | None = None
    layer: int = 0
    logit_scale: float | None = None
    budget: int = 0
    beacons: list[Any] = field(default_factory=list)

    @property
    def scale(self) -> float:
        return self.keys.shape[2] ** -0.5 if self.logit_scale is None else self.logit_scale


# Returns a score for every token before the window, [num_kv_heads, L - window], higher = keep. One whose
# function has an attribute ``observe`` wants that called with the inputs of all layers and its own keywords, before any
# layer is scored, where generated tokens are compacted.
ScoreFunction = Callable[[ScoreInputs], torch.Tensor]


def rkv_scores(
    inputs: ScoreInputs, *, mix_lambda: float, kernel_size: int, similarity_threshold: float
) -> torch.Tensor:
    """Return ``mix_lambda * importance - (1 - mix_lambda) * redundancy``, ``[num_kv_heads, L - window]``, fp32."""
    keys, queries = inputs.keys.float(), inputs.window_queries.float()
    num_kv_heads, resident_len, head_dim = keys.shape
    window = queries.shape[1]

    grouped_queries = queries.view(num_kv_heads, -1, window, head_dim)
    logits = (grouped_queries @ keys.mT.unsqueeze(1)) * inputs.scale
    # The maximum over the group is taken on logits, and the window's own columns take no part in the softmax.
    attention = logits.amax(dim=1)[..., : resident_len - window].softmax(dim=-1)
    importance = F.max_pool1d(attention.mean(dim=1), kernel_size, stride=1, padding=kernel_size // 2)

    redundancy = redundancies(keys, similarity_threshold)
    return mix_lambda * importance - (1 - mix_lambda) * redundancy[:, : resident_len - window]


def redundancies(keys: torch.Tensor, similarity_threshold: float) -> torch.Tensor:
    """Return how redundant each of ``keys``, ``[num_kv_heads, L, head_dim]``, is, ``[num_kv_heads, L]``, fp32."""
    resident_len = keys.shape[1]
    unit_keys = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    similarity = unit_keys @ unit_keys.mT
    similarity.diagonal(dim1=-2, dim2=-1).zero_()
    columns = torch.arange(resident_len)
    # The most recent near-duplicate of each row's token is exempt; column 0 where there is none.
    most_recent = torch.where(similarity > similarity_threshold, columns, 0).amax(dim=-1, keepdim=True)
    similarity.scatter_(-1, most_recent, 0.0)
    return similarity.mean(dim=-2).softmax(dim=-1)
