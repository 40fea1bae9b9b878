"""TriAttention: keep what the model's usual queries will attend to."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.algorithm.rope import Rope
from rkv_sglang.algorithm.validation import check_keys
from rkv_sglang.policies.base import ScoreInputs
from rkv_sglang.policies.parameters import check_calibration

# How far ahead queries are looked for: 1, 2, 4, ... 4096 tokens.
DISTANCES = tuple(2**power for power in range(13))
# Below this, the scores of a head are alike, and their differences mean nothing.
LEAST_DEVIATION = 1e-6


@dataclass(frozen=True, kw_only=True)
class TriAttention:
    """TriAttention, arXiv 2604.04921: the logits that queries like the model's usual ones will give a key.

    ``score_j = max over the query heads h of the group of (S_h[j] - mean S_h) / deviation of S_h``, both over the
    candidates, with ``S_h[j] = Re sum over rotated pairs f of q_f * conj(k_jf) + sum of e_f |k_jf|``. ``k_jf`` is a
    pair of the cached key, as a complex number; ``q_f = a * mu_f * e^(i w_f n) * mean over d of e^(i w_f d)`` and
    ``e_f = a * (m_f - |mu_f|)``, with ``mu_f`` the mean of the head's queries before their position turns them,
    ``m_f`` the mean of their lengths, ``w_f`` the frequency, ``a`` the rotary factor, n the tokens ever seen and d the
    distances 1, 2, 4, ... 4096. As a product of a query and the cached keys this is what the paper sums up over
    positions and distances.

    It reads no queries of the request: the statistics are the model's, from a calibration.

    Attributes:
        statistics: Path of a file of statistics; empty: the server makes one when it first starts with the model.
        questions: Questions that the model is asked for it, 1 to 32.
        answer_tokens: Length of each answer.
    """

    needs_statistics: ClassVar[bool] = True

    statistics: str = ""
    questions: int = 32
    answer_tokens: int = 2048

    def __post_init__(self) -> None:
        check_calibration(self.questions, self.answer_tokens)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        check_keys(inputs.keys)
        rope, statistics = inputs.model.rope, inputs.model.statistics
        if rope is None or statistics is None:
            raise ValueError("policy triattention needs the model's rotary positions and statistics of its queries")
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        layer = statistics.of_layers(inputs.layer, 1)
        logical_len = num_tokens + inputs.evicted_tokens
        # [num_qo_heads, num_pairs]
        queries = (
            expected_queries(rope, layer)[0] * rope.turns_on([logical_len], layer.means.device, layer.means.dtype)[0]
        )
        spread = lengthwise(rope, layer)[0]
        pairs = rope.pairs(inputs.keys[: num_tokens - len(inputs.queries)])
        queries, spread = (part.view(num_kv_heads, -1, rope.num_pairs) for part in (queries, spread))
        return best_of_group(queries, spread, pairs, inputs.prompt_len)


def best_of_group(queries: Tensor, spread: Tensor, pairs: Tensor, prompt_len: int) -> Tensor:
    """Return the score of tokens by what is expected of the query heads, ``[num_kv_heads, num_tokens]``, real.

    Args:
        queries: ``q`` of each head of each group, ``[num_kv_heads, gqa_group_size, num_pairs]``, complex of any size.
        spread: ``e``, the same shape, real.
        pairs: Of the keys, ``[num_tokens, num_kv_heads, num_pairs]``, complex.
        prompt_len: The first tokens, which are no candidates.
    """
    # [num_kv_heads, num_pairs, num_tokens]
    pairs = pairs.permute(1, 2, 0)
    scores = queries.real @ pairs.real + queries.imag @ pairs.imag + spread @ pairs.abs()
    candidates = scores[:, :, prompt_len:]
    deviation = candidates.std(dim=2, keepdim=True, correction=0).clamp(min=LEAST_DEVIATION)
    return ((scores - candidates.mean(dim=2, keepdim=True)) / deviation).amax(dim=1)


def expected_queries(rope: Rope, statistics: QueryStatistics) -> Tensor:
    """Return ``a * mu * mean over d of e^(i w d)``, of the shape and type of ``statistics.means``."""
    return statistics.means * (rope.mean_turn_on(DISTANCES, statistics.means) * rope.factor)


def lengthwise(rope: Rope, statistics: QueryStatistics) -> Tensor:
    """Return ``a * (m - |mu|)``, of the shape and type of ``statistics.mean_lengths``."""
    return rope.factor * (statistics.mean_lengths - statistics.means.abs())
