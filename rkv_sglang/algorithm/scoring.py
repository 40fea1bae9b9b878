"""The R-KV score, vectorised: the functions of ``reference`` without the L x L matrix. Source: arXiv 2505.24133.

With the unit keys ``u`` and their sum ``s``, the column sums of the cosine matrix (diagonal 0) are
``u_j . s - |u_j|^2``: no pair is looked at. Pairs matter only for the one near-duplicate that each row exempts, its
most recent, which the keys of a trained model show among the newest few percent of the columns. So each row scans
columns from the newest to the oldest, block by block, and leaves at its first hit.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from rkv_sglang.algorithm.reference import NORM_EPS
from rkv_sglang.algorithm.validation import (
    check_kernel_size,
    check_keys,
    check_mix_lambda,
    check_queries,
    check_threshold,
)

# Columns of the first block, which all L rows meet: few, since most rows find their near-duplicate here.
FIRST_BLOCK = 16
# A later block has as many columns as rows that are left allow: at most BLOCK_AREA * L pairs are held at once.
BLOCK_AREA = 128


def importance(queries: Tensor, keys: Tensor, kernel_size: int) -> Tensor:
    """Attention that the window pays to each earlier token, max-pooled over neighbours in time.

    Args:
        queries: Post-RoPE queries of the last tokens, oldest first, ``[window, num_qo_heads, head_dim]``, floating.
            Query heads ``g * G`` to ``g * G + G - 1`` share KV head ``g``.
        keys: Keys as cached, temporal order, ``[L, num_kv_heads, head_dim]``, floating.
        kernel_size: Width of the max-pool, odd; stride 1, padded with -inf.

    Returns:
        ``[num_kv_heads, L - window]``, fp32.

    Raises:
        ValueError: A shape, dtype, device or value differs from the above.

    Reference: ``rkv_sglang.algorithm.reference.importance``.
    """
    check_keys(keys)
    check_queries(queries, keys)
    check_kernel_size(kernel_size)
    return _importance(queries, keys.permute(1, 0, 2).float(), kernel_size)


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
    queries: Tensor, keys: Tensor, *, mix_lambda: float, kernel_size: int, similarity_threshold: float
) -> Tensor:
    """Score of each token before the window: ``mix_lambda * importance - (1 - mix_lambda) * redundancy``.

    Args:
        queries: As in ``importance``.
        keys: As in ``importance``.
        mix_lambda: Weight of importance, in [0, 1].
        kernel_size: As in ``importance``.
        similarity_threshold: As in ``redundancy``, which takes its softmax over all L tokens.

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
    important = _importance(queries, head_keys, kernel_size)
    redundant = _redundancy(head_keys, similarity_threshold)
    return mix_lambda * important - (1.0 - mix_lambda) * redundant[:, : important.shape[1]]


def _importance(queries: Tensor, head_keys: Tensor, kernel_size: int) -> Tensor:
    """``importance`` of ``head_keys`` ``[num_kv_heads, L, head_dim]``, fp32."""
    num_kv_heads, num_tokens, head_dim = head_keys.shape
    window, num_qo_heads, _ = queries.shape
    group_size = num_qo_heads // num_kv_heads
    if num_tokens == window:
        return head_keys.new_empty(num_kv_heads, 0)
    # [num_kv_heads, group_size * window, head_dim]
    grouped = queries.float().transpose(0, 1).reshape(num_kv_heads, group_size * window, head_dim)
    logits = grouped @ head_keys[:, : num_tokens - window].transpose(1, 2) / math.sqrt(head_dim)
    logits = logits.reshape(num_kv_heads, group_size, window, num_tokens - window)
    attention = logits.amax(dim=1).softmax(dim=-1)
    return max_pool1d(attention.mean(dim=1), kernel_size, stride=1, padding=kernel_size // 2)


def _redundancy(head_keys: Tensor, threshold: float) -> Tensor:
    """``redundancy`` of ``head_keys`` ``[num_kv_heads, L, head_dim]``, fp32."""
    unit: Tensor = head_keys / (torch.linalg.vector_norm(head_keys, dim=-1, keepdim=True) + NORM_EPS)
    total = unit.sum(dim=1).unsqueeze(2)
    # [num_kv_heads, L]
    column_sums = (unit @ total).squeeze(2) - unit.square().sum(dim=-1)
    exempt_sums = torch.stack([_exempt_sums(head_unit, threshold) for head_unit in unit])
    return ((column_sums - exempt_sums) / unit.shape[1]).softmax(dim=-1)


def _exempt_sums(unit: Tensor, threshold: float) -> Tensor:
    """Per column, the sum of the similarities that rows exempt there, for the unit keys ``[L, head_dim]`` of one head.

    Inside, rows and columns are counted from the newest, so that the most recent hit is the first one.
    """
    num_tokens = unit.shape[0]
    newest_first = unit.flip(0)
    exempt = unit.new_zeros(num_tokens)
    rows = torch.arange(num_tokens, device=unit.device)
    row_keys = newest_first
    start, width = 0, FIRST_BLOCK
    while start < num_tokens:
        end = min(start + width, num_tokens)
        # [len(rows), end - start]
        similarity = row_keys @ newest_first[start:end].T
        _zero_diagonal(similarity, rows - start)
        has_hit = similarity.amax(dim=1) > threshold
        hit_rows = has_hit.nonzero().squeeze(1)
        if len(hit_rows) > 0:
            found = similarity[hit_rows]
            # argmax gives the first of equal values
            first_hit = (found > threshold).to(torch.uint8).argmax(dim=1, keepdim=True)
            exempt.index_add_(0, start + first_hit.squeeze(1), found.gather(1, first_hit).squeeze(1))
            left = (~has_hit).nonzero().squeeze(1)
            if len(left) == 0:
                return exempt.flip(0)
            rows, row_keys = rows[left], row_keys[left]
        start, width = end, BLOCK_AREA * num_tokens // len(rows)
    # A row without a hit exempts the oldest column; on the diagonal that is a 0.
    exempt[-1] += (row_keys @ newest_first[-1]).masked_fill(rows == num_tokens - 1, 0.0).sum()
    return exempt.flip(0)


def _zero_diagonal(similarity: Tensor, diagonal: Tensor) -> None:
    """Set ``similarity[i, diagonal[i]]`` to 0 in place where ``diagonal[i]`` is one of its columns."""
    num_columns = similarity.shape[1]
    column = diagonal.clamp(0, num_columns - 1).unsqueeze(1)
    inside = column.squeeze(1) == diagonal
    kept = similarity.gather(1, column).masked_fill(inside.unsqueeze(1), 0.0)
    similarity.scatter_(1, column, kept)
