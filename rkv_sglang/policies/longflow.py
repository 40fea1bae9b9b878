"""LongFlow: keep what contributes most to the newest token."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rkv_sglang.algorithm.validation import check_keys, check_queries
from rkv_sglang.policies.base import ScoreInputs


@dataclass(frozen=True, kw_only=True)
class LongFlow:
    """LongFlow, arXiv 2603.11504: attention of the newest query times the size of what it fetches.

    ``score_j = (sum over query heads h of the group of p_h[j]) * |v_j|_1``, where ``p_h`` is the attention of the last
    query of the window as the model computes it: the softmax over all L tokens of its logits of ``q_h . k_j``.

    The authors' code sums over all heads of a layer, so that these keep the same tokens, and drops one token a step.
    Here each KV head sums over its own query group and keeps its own tokens, and as many go at once as have gathered.

    It has no parameters.
    """

    needs_values: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        if inputs.values is None:
            raise ValueError("policy longflow scores values, and the inputs hold none")
        check_keys(inputs.keys)
        check_queries(inputs.queries, inputs.keys)
        num_tokens, num_kv_heads, head_dim = inputs.keys.shape
        # [num_kv_heads, gqa_group_size, head_dim] and [num_kv_heads, head_dim, L]
        newest = inputs.queries[-1].float().reshape(num_kv_heads, -1, head_dim)
        attention = inputs.model.logits(newest @ inputs.keys.permute(1, 2, 0).float(), head_dim).softmax(dim=-1)
        sizes = inputs.values.float().abs().sum(dim=2).T
        return (attention.sum(dim=1) * sizes)[:, : num_tokens - inputs.queries.shape[0]]
