"""The R-KV score, vectorised: the functions of ``reference`` without the L x L matrix. Source: arXiv 2505.24133.

With the unit keys ``u`` and their sum ``s``, the column sums of the cosine matrix (diagonal 0) are
``u_j . s - |u_j|^2``: no pair is looked at. Pairs matter only for the one near-duplicate that each row exempts, its
most recent, which the keys of a trained model show among the newest few percent of the columns. So each row scans
columns from the newest to the oldest, block by block, and leaves at its first hit.
"""

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.reference import NORM_EPS
from rkv_sglang.algorithm.validation import (
    check_kernel_size,
    check_keys,
    check_mix_lambda,
    check_queries,
    check_threshold,
)

# Columns of the first block, which all L rows meet: few, since most rows find their near-duplicate here.
FIRST_WIDTH = 16
# Every later block holds twice the pairs of the one before, up to MAX_AREA * L: fewer rows, so more columns.
MAX_AREA = 64


def importance(queries: Tensor, keys: Tensor, kernel_size: int, *, model: ModelAttention = PLAIN_ATTENTION) -> Tensor:
    """Attention that the window pays to each earlier token, max-pooled over neighbours in time.

    Args:
        queries: Post-RoPE queries of the last tokens, oldest first, ``[window, num_qo_heads, head_dim]``, floating.
            Query heads ``g * G`` to ``g * G + G - 1`` share KV head ``g``.
        keys: Keys as cached, temporal order, ``[L, num_kv_heads, head_dim]``, floating.
        kernel_size: Width of the max-pool, odd; stride 1, padded with -inf.
        model: How logits are made of products.

    Returns:
        ``[num_kv_heads, L - window]``, fp32.

    Raises:
        ValueError: A shape, dtype, device or value differs from the above.

    Reference: ``rkv_sglang.algorithm.reference.importance``.
    """
    check_keys(keys)
    check_queries(queries, keys)
    check_kernel_size(kernel_size)
    return _importance(queries, keys.permute(1, 0, 2).float(), kernel_size, model)


def redundancy(keys: Tensor, threshold: float) -> Tensor:
    """How much each token's key repeats the others, as a softmax over all tokens.

    Holds ``O(L)`` floats besides a copy of the keys. Each block of columns costs a device-to-host sync on a GPU.

    Args:
        keys: Keys as cached, temporal order, ``[L, num_kv_heads, head_dim]``, floating.
        threshold: Cosine above which two keys are near-duplicates; the diagonal counts as 0.

    Returns:
        ``[num_kv_heads, L]``, fp32; every row sums to 1.

    Raises:
        ValueError: A shape, dtype or value differs from the above.

    Reference: ``rkv_sglang.algorithm.reference.redundancy``.
    """
    check_keys(keys)
    check_threshold(threshold)
    return _redundancy(keys.permute(1, 0, 2).float(), threshold)


def rkv_scores(
    queries: Tensor,
    keys: Tensor,
    *,
    mix_lambda: float,
    kernel_size: int,
    similarity_threshold: float,
    model: ModelAttention = PLAIN_ATTENTION,
) -> Tensor:
    """Score of each token before the window: ``mix_lambda * importance - (1 - mix_lambda) * redundancy``.

    Args:
        queries: As in ``importance``.
        keys: As in ``importance``.
        mix_lambda: Weight of importance, in [0, 1].
        kernel_size: As in ``importance``.
        similarity_threshold: As in ``redundancy``, which takes its softmax over all L tokens.
        model: As in ``importance``.

    Returns:
        ``[num_kv_heads, L - window]``, fp32; higher means keep.

    Raises:
        ValueError: A shape, dtype, device or value differs from the above.

    Reference: ``rkv_sglang.algorithm.reference.rkv_scores``.
    """
    check_mix_lambda(mix_lambda)
    check_keys(keys)
    check_queries(queries, keys)
    check_kernel_size(kernel_size)
    check_threshold(similarity_threshold)
    head_keys = keys.permute(1, 0, 2).float()
    important = _importance(queries, head_keys, kernel_size, model)
    redundant = _redundancy(head_keys, similarity_threshold)
    return mix_lambda * important - (1.0 - mix_lambda) * redundant[:, : important.shape[1]]


def _importance(queries: Tensor, head_keys: Tensor, kernel_size: int, model: ModelAttention) -> Tensor:
    """``importance`` of ``head_keys`` ``[num_kv_heads, L, head_dim]``, fp32."""
    num_kv_heads, num_tokens, head_dim = head_keys.shape
    window, num_qo_heads, _ = queries.shape
    group_size = num_qo_heads // num_kv_heads
    if num_tokens == window:
        return head_keys.new_empty(num_kv_heads, 0)
    # [num_kv_heads, group_size * window, head_dim]
    grouped = queries.float().transpose(0, 1).reshape(num_kv_heads, group_size * window, head_dim)
    logits = model.logits(grouped @ head_keys[:, : num_tokens - window].transpose(1, 2), head_dim)
    logits = logits.reshape(num_kv_heads, group_size, window, num_tokens - window)
    attention = logits.amax(dim=1).softmax(dim=-1)
    return max_pool1d(attention.mean(dim=1), kernel_size, stride=1, padding=kernel_size // 2)


def _redundancy(head_keys: Tensor, threshold: float) -> Tensor:
    """``redundancy`` of ``head_keys`` ``[num_kv_heads, L, head_dim]``, fp32."""
    norms = torch.linalg.vector_norm(head_keys, dim=2, keepdim=True)
    lengths = norms + NORM_EPS
    diagonals = (norms / lengths).square().squeeze(2)
    column_sums = []
    # Head by head: the keys of one head stay in a CPU's cache, and each head has rows of its own left to scan.
    for keys_of_head, lengths_of_head, diagonal in zip(head_keys, lengths, diagonals, strict=True):
        unit = keys_of_head / lengths_of_head
        column_sums.append(unit @ unit.sum(dim=0) - diagonal - _exempt_sums(unit, threshold))
    return (torch.stack(column_sums) / head_keys.shape[1]).softmax(dim=-1)


def _exempt_sums(unit: Tensor, threshold: float) -> Tensor:
    """Per column, the sum of the similarities that rows exempt there, ``[L]``, for unit keys ``[L, head_dim]``."""
    num_tokens = unit.shape[0]
    # Columns are ranked from 1, so that rank 0 means no hit; what is added there is dropped.
    sums_by_rank = unit.new_zeros(num_tokens + 1)
    # Ranks are compared as fp32, which is exact up to 2^24 tokens.
    ranks = torch.arange(1, num_tokens + 1, device=unit.device, dtype=unit.dtype)
    rows = torch.arange(num_tokens, device=unit.device)
    row_keys = unit
    end, width, area = num_tokens, FIRST_WIDTH, FIRST_WIDTH
    while end > 0:
        start = max(0, end - width)
        # [len(rows), end - start]
        similarity = row_keys @ unit[start:end].T
        _zero_diagonal(similarity, rows, start, num_tokens)
        # The comparison writes fp32: storing and reducing booleans is several times slower on a CPU.
        above = torch.gt(similarity, threshold, out=torch.empty_like(similarity))
        newest_rank = above.mul_(ranks[start:end]).amax(dim=1).long()
        column = (newest_rank - (start + 1)).clamp_(min=0).unsqueeze(1)
        sums_by_rank.index_add_(0, newest_rank, similarity.gather(1, column).squeeze(1))
        left = (newest_rank == 0).nonzero().squeeze(1)
        if len(left) == 0:
            return sums_by_rank[1:]
        if len(left) < len(rows):
            rows, row_keys = rows.index_select(0, left), row_keys.index_select(0, left)
        area = min(2 * area, MAX_AREA)
        end, width = start, area * num_tokens // len(rows)
    # A row without a hit exempts column 0; on the diagonal that is a 0.
    sums_by_rank[1] += (row_keys @ unit[0]).masked_fill(rows == 0, 0.0).sum()
    return sums_by_rank[1:]


def _zero_diagonal(similarity: Tensor, rows: Tensor, start: int, num_tokens: int) -> None:
    """Set to 0, in place, where the token ``rows[i]`` of row i is the token ``start + j`` of column j."""
    if len(rows) == num_tokens:
        similarity.diagonal(-start).zero_()
        return
    diagonal = (rows - start).unsqueeze(1)
    nearest = diagonal.clamp(0, similarity.shape[1] - 1)
    similarity.scatter_(1, nearest, similarity.gather(1, nearest).masked_fill_(nearest == diagonal, 0.0))
