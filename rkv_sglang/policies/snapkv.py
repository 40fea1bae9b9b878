"""SnapKV: keep what the window attends to."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rkv_sglang.algorithm.scoring import importance
from rkv_sglang.algorithm.validation import check_kernel_size
from rkv_sglang.config import GRANULARITIES
from rkv_sglang.policies.base import ScoreInputs


@dataclass(frozen=True, kw_only=True)
class SnapKV:
    """SnapKV, arXiv 2404.14469, used while decoding: the importance of R-KV alone.

    ``score_j = max over neighbours i of j of (mean over t of p[t, i])``, where ``p[t, :]`` is the softmax over all
    tokens before the window of the model's logits of ``max over the query group of q_t . k_j``, for the queries t of
    the window.

    Attributes:
        kernel_size: Width of the max-pool over neighbours in time, odd; 1 turns it off.
    """

    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES

    kernel_size: int = 7

    def __post_init__(self) -> None:
        check_kernel_size(self.kernel_size)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """See ``Policy.score``."""
        return importance(inputs.queries, inputs.keys, self.kernel_size, model=inputs.model)
