"""G-KV: keep what was ever attended to much, and is no near-copy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import max_pool1d

from rkv_sglang.algorithm.scoring import redundancy
from rkv_sglang.algorithm.validation import check_kernel_size, check_keys, check_queries, check_threshold
from rkv_sglang.policies.base import Scored, ScoreInputs
from rkv_sglang.policies.parameters import check_fraction


@dataclass(frozen=True, kw_only=True)
class GKV:
    """G-KV, arXiv 2512.00504: attention remembered over compactions, and the redundancy of R-KV.

    ``score_j = importance_weight * F_j - (1 - importance_weight) * R_j / max R`` with
    ``F_j = max(decay * F_j at the last compaction, p_j / max p)``. ``p_j`` is the largest over neighbours i of j of the
    mean over the window's queries t of the largest over the query group of ``a_h[t, i]``, and ``a_h[t, :]`` the softmax
    over all tokens before the window of the model's logits of head h. ``R`` is the redundancy of R-KV. The maxima are
    taken over all tokens that have a p or an R, the prompt's too. F travels with the token: one float per token and
    head.

    Attributes:
        importance_weight: Weight of F, in [0, 1].
        decay: What is left of F at the next compaction, in [0, 1].
        kernel_size: Width of the max-pool over neighbours in time, odd.
        similarity_threshold: Cosine above which two keys are near-duplicates.
    """

    stateful: ClassVar[bool] = True
    default_window: ClassVar[int] = 16

    importance_weight: float = 0.5
    decay: float = 0.8
    kernel_size: int = 7
    similarity_threshold: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("importance_weight", self.importance_weight)
        check_fraction("decay", self.decay)
        check_kernel_size(self.kernel_size)
        check_threshold(self.similarity_threshold)

    def score(self, inputs: ScoreInputs) -> Scored:
        """See ``Policy.score``."""
        check_keys(inputs.keys)
        check_queries(inputs.queries, inputs.keys)
        num_tokens, num_kv_heads, head_dim = inputs.keys.shape
        window = len(inputs.queries)
        # [num_kv_heads, 1, L - window, head_dim] and [num_kv_heads, gqa_group_size, window, head_dim]
        earlier = inputs.keys[: num_tokens - window].permute(1, 0, 2).unsqueeze(1).float()
        grouped = inputs.queries.float().reshape(window, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        attention = inputs.model.logits(grouped @ earlier.transpose(2, 3), head_dim).softmax(dim=3)
        received = attention.amax(dim=1).mean(dim=1)
        received = max_pool1d(received, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        state = received / received.amax(dim=1, keepdim=True)
        if inputs.state is not None:
            scored = state[:, inputs.prompt_len : inputs.prompt_len + inputs.num_scored]
            torch.maximum(scored, self.decay * inputs.state, out=scored)
        repeated = redundancy(inputs.keys, self.similarity_threshold)
        repeated = (repeated / repeated.amax(dim=1, keepdim=True))[:, : num_tokens - window]
        return Scored(self.importance_weight * state - (1.0 - self.importance_weight) * repeated, state)
