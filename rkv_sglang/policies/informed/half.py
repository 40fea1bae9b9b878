"""Half: R-KV for one half of the room, a random draw for the other."""

from dataclasses import dataclass

from torch import Tensor

from rkv_sglang.algorithm.scoring import rkv_scores
from rkv_sglang.algorithm.selection import select_kept
from rkv_sglang.policies.base import ScoreInputs
from rkv_sglang.policies.random import check_seed
from rkv_sglang.policies.random_attention import RandomAttention

# Above every number that is drawn.
CHOSEN = 2.0


@dataclass(frozen=True, kw_only=True)
class Half:
    """Half by R-KV, arXiv 2505.24133, and half at random, as arXiv 2609.03430 draws: nobody has published the two.

    R-KV keeps what is said once, a random draw keeps a line of reasoning. Of the ``n = budget - window`` tokens to keep
    ``(n + 1) // 2`` are those with the best scores of R-KV, the rest is drawn from the others: ``score_j = 2`` for the
    former, and for the others the number in [0, 1) of ``RandomAttention``, which is another one at every compaction,
    layer and KV head.

    Attributes:
        mix_lambda: As in ``RKV``, and so the next two.
        kernel_size: Width of the max-pool over importance, odd.
        similarity_threshold: Cosine above which two keys are near-duplicates.
        seed: Chooses the draw, in [0, 2^32).
    """

    mix_lambda: float = 0.5
    kernel_size: int = 7
    similarity_threshold: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        if inputs.budget is None:
            raise ValueError("policy half shares out a budget, and the inputs name none")
        window = len(inputs.queries)
        scores = rkv_scores(
            inputs.queries,
            inputs.keys,
            mix_lambda=self.mix_lambda,
            kernel_size=self.kernel_size,
            similarity_threshold=self.similarity_threshold,
            model=inputs.model,
        )
        drawn = RandomAttention(seed=self.seed).score(inputs)
        # Of the prompt nothing is drawn.
        drawn[:, : inputs.prompt_len] = 0.0
        by_score = chosen_by_score(inputs.budget, window)
        best = select_kept(scores, inputs.prompt_len, window, window + by_score)[:, :by_score]
        return drawn.scatter(1, best + inputs.prompt_len, CHOSEN)


def chosen_by_score(budget: int, window: int) -> int:
    """Return how many of the ``budget`` tokens are chosen by their score."""
    return (budget - window + 1) // 2
