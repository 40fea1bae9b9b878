"""KeyDiff: keep the keys that point another way than most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rkv_sglang.algorithm.reference import NORM_EPS
from rkv_sglang.algorithm.validation import check_keys
from rkv_sglang.config import GRANULARITIES
from rkv_sglang.policies.base import ScoreInputs


@dataclass(frozen=True, kw_only=True)
class KeyDiff:
    """KeyDiff, arXiv 2504.15364: how little a key resembles the mean direction of all keys.

    ``score_j = -cos(k_j, mean over i of u_i)`` with the unit keys ``u_i = k_i / (|k_i| + 1e-8)`` of all L tokens. The
    cosine divides by ``|k_j| + 1e-8`` and by the norm of the mean plus 1e-8.

    It has no parameters and reads no queries.
    """

    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        check_keys(inputs.keys)
        # [num_kv_heads, L, head_dim]
        unit = _unit(inputs.keys.permute(1, 0, 2).float())
        direction = _unit(unit.mean(dim=1))
        num_scored = unit.shape[1] - inputs.queries.shape[0]
        return -(unit[:, :num_scored] @ direction.unsqueeze(2)).squeeze(2)


def _unit(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / (norms + NORM_EPS)
