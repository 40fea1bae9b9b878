"""Scores by the attention that tokens receive, and nothing else: the parts of R-KV's score that SnapKV and H2O are."""

from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.attention import combined_scores
from rkv_sglang.kernels.score.config import ScoreConfig


def snapkv_scores_paged(
    keys: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    *,
    kernel_size: int,
    model: ModelAttention = PLAIN_ATTENTION,
    config: ScoreConfig | None = None,
) -> Tensor:
    """Score every token by its importance alone, as SnapKV does (arXiv 2404.14469). Queues no sync.

    Args:
        keys, batch, queries, kernel_size, model, config: As in ``rkv_scores_paged``.

    Returns:
        As ``rkv_scores_paged``.

    Raises:
        ValueError: A shape, dtype, device, stride or value differs from the above.

    Reference: ``rkv_sglang.algorithm.reference.importance``.
    """
    return combined_scores(keys, batch, queries, kernel_size, 1.0, None, model, config)


def h2o_scores_paged(
    keys: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    *,
    model: ModelAttention = PLAIN_ATTENTION,
    config: ScoreConfig | None = None,
) -> Tensor:
    """Score every token by the attention that all queries of the window pay it, as H2O adds it up. Queues no sync.

    Args:
        keys, batch, queries, model, config: As in ``rkv_scores_paged``.

    Returns:
        As ``rkv_scores_paged``; what earlier compactions counted is not in it.

    Raises:
        ValueError: A shape, dtype, device, stride or value differs from the above.

    Reference: ``rkv_sglang.policies.H2O``.
    """
    return combined_scores(keys, batch, queries, 1, float(batch.window), None, model, config)
