"""R-KV: keep what the window attends to, drop what repeats."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rkv_sglang.algorithm.scoring import rkv_scores
from rkv_sglang.config import GRANULARITIES
from rkv_sglang.policies.base import ScoreInputs


@dataclass(frozen=True, kw_only=True)
class RKV:
    """R-KV, arXiv 2505.24133: redundancy-aware KV cache compression for reasoning models.

    ``score_j = mix_lambda * importance_j - (1 - mix_lambda) * redundancy_j``, where importance is the window's
    attention (max over the query group, softmax, mean, max-pool) and redundancy the softmax of each key's mean cosine
    with all keys, each row's most recent near-duplicate left out.

    Attributes:
        mix_lambda: Weight of importance, in [0, 1]. The paper's is 0.1; 0.5 kept more answers where it was measured
            (``docs/results/quality.md``).
        kernel_size: Width of the max-pool over importance, odd.
        similarity_threshold: Cosine above which two keys are near-duplicates.
    """

    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES
    keeps_prompt_hits: ClassVar[bool] = True

    mix_lambda: float = 0.5
    kernel_size: int = 7
    similarity_threshold: float = 0.5

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        return rkv_scores(
            inputs.queries,
            inputs.keys,
            mix_lambda=self.mix_lambda,
            kernel_size=self.kernel_size,
            similarity_threshold=self.similarity_threshold,
            model=inputs.model,
            prompt_hits=inputs.prompt_hits,
        )
