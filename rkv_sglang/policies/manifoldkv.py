"""ManifoldKV: keep the keys that lie far from the middle."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_sglang.algorithm.validation import check_keys
from rkv_sglang.policies.base import ScoreInputs
from rkv_sglang.policies.parameters import check_at_least


@dataclass(frozen=True, kw_only=True)
class ManifoldKV:
    """ManifoldKV, arXiv 2602.08343: Euclidean distance of a key to the mean key.

    ``score_j = | k_j - mean over i of k_i |``, the Euclidean norm, with the mean over all L tokens, or over the last
    ``mean_tokens`` of them where L is more: the paper finds that a mean over a long context says too little (its
    experiments with one mean end at 16K tokens).

    It reads no queries.

    Attributes:
        mean_tokens: Most recent resident tokens that make the mean, 1 or more.
    """

    mean_tokens: int = 16384

    def __post_init__(self) -> None:
        check_at_least("mean_tokens", self.mean_tokens, 1)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        check_keys(inputs.keys)
        # [num_kv_heads, L, head_dim]
        keys = inputs.keys.permute(1, 0, 2).float()
        mean = keys[:, -self.mean_tokens :].mean(dim=1, keepdim=True)
        num_scored = keys.shape[1] - inputs.queries.shape[0]
        distances: Tensor = torch.linalg.vector_norm(keys[:, :num_scored] - mean, dim=2)
        return distances
