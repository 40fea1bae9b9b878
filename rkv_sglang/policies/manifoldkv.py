"""ManifoldKV: keep the keys that lie far from the middle."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_sglang.algorithm.validation import check_keys
from rkv_sglang.policies.base import ScoreInputs
from rkv_sglang.policies.parameters import check_at_least


@dataclass(frozen=True, kw_only=True)
class ManifoldKV:
    """ManifoldKV, arXiv 2602.08343, windowed: Euclidean distance of a key to the mean key of its part of the request.

    ``score_j = | k_j - mean over i of the part of j of k_i |``, the Euclidean norm. The parts are the first
    ``mean_tokens`` of the L resident tokens, the next ones, and so on; the last may be shorter. The paper takes parts
    for long contexts, where one mean says too little; a request of at most ``mean_tokens`` has one mean, as in its
    plain form.

    It reads no queries.

    Attributes:
        mean_tokens: Resident tokens that share a mean, 1 or more.
    """

    mean_tokens: int = 4096

    def __post_init__(self) -> None:
        check_at_least("mean_tokens", self.mean_tokens, 1)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        check_keys(inputs.keys)
        # [num_kv_heads, L, head_dim]
        keys = inputs.keys.permute(1, 0, 2).float()
        distances = [
            torch.linalg.vector_norm(part - part.mean(dim=1, keepdim=True), dim=2)
            for part in torch.split(keys, self.mean_tokens, dim=1)
        ]
        return torch.cat(distances, dim=1)[:, : keys.shape[1] - inputs.queries.shape[0]]
