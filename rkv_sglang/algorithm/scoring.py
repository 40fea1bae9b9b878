"""The R-KV score, vectorised: the functions of ``reference`` without the L x L matrix. Source: arXiv 2505.24133.

With the unit keys ``u`` and their sum ``s``, the column sums of the cosine matrix (diagonal 0) are
``u_j . s - |u_j|^2``: no pair is looked at. Pairs matter only for the one near-duplicate that each row exempts, its
most recent, which the keys of a trained model show among the newest few percent of the columns: see
``near_duplicates``.
"""

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.near_duplicates import PromptHits, exempt_sums
from rkv_sglang.algorithm.reference import NORM_EPS
from rkv_sglang.algorithm.validation import (
    check_kernel_size,
    check_keys,
    check_mix_lambda,
    check_queries,
    check_threshold,
)


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


def redundancy(keys: Tensor, threshold: float, prompt_hits: PromptHits | None = None) -> Tensor:
    """How much each token's key repeats the others, as a softmax over all tokens.

    Holds ``O(L)`` floats besides a copy of the keys. Each block of columns costs a device-to-host sync on a GPU.
    Mutates ``prompt_hits`` unless it is filled.

    Args:
        keys: Keys as cached, temporal order, ``[L, num_kv_heads, head_dim]``, floating.
        threshold: Cosine above which two keys are near-duplicates; the diagonal counts as 0.
        prompt_hits: Of one layer, what the first tokens find among themselves; None to find it anew.

    Returns:
        ``[num_kv_heads, L]``, fp32; every row sums to 1.

    Raises:
        ValueError: A shape, dtype or value differs from the above.

    Reference: ``rkv_sglang.algorithm.reference.redundancy``.
    """
    check_keys(keys)
    check_threshold(threshold)
    _check_prompt_hits(prompt_hits, keys)
    return _redundancy(keys.permute(1, 0, 2).float(), threshold, prompt_hits)


def rkv_scores(
    queries: Tensor,
    keys: Tensor,
    *,
    mix_lambda: float,
    kernel_size: int,
    similarity_threshold: float,
    model: ModelAttention = PLAIN_ATTENTION,
    prompt_hits: PromptHits | None = None,
) -> Tensor:
    """Score of each token before the window: ``mix_lambda * importance - (1 - mix_lambda) * redundancy``.

    Mutates ``prompt_hits`` unless it is filled.

    Args:
        queries: As in ``importance``.
        keys: As in ``importance``.
        mix_lambda: Weight of importance, in [0, 1].
        kernel_size: As in ``importance``.
        similarity_threshold: As in ``redundancy``, which takes its softmax over all L tokens.
        model: As in ``importance``.
        prompt_hits: As in ``redundancy``.

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
    _check_prompt_hits(prompt_hits, keys)
    head_keys = keys.permute(1, 0, 2).float()
    important = _importance(queries, head_keys, kernel_size, model)
    redundant = _redundancy(head_keys, similarity_threshold, prompt_hits)
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


def _check_prompt_hits(prompt_hits: PromptHits | None, keys: Tensor) -> None:
    """Raise ``ValueError`` unless they are of one layer and of no more tokens than ``keys``."""
    if prompt_hits is None:
        return
    columns, (num_tokens, num_kv_heads, _) = prompt_hits.columns, keys.shape
    if columns.dtype != torch.int32 or columns.shape[:2] != (1, num_kv_heads) or prompt_hits.prompt_len > num_tokens:
        raise ValueError(
            f"prompt_hits must be int32 [1, {num_kv_heads}, at most {num_tokens}], got {columns.dtype} "
            f"{list(columns.shape)}"
        )


def _redundancy(head_keys: Tensor, threshold: float, prompt_hits: PromptHits | None) -> Tensor:
    """``redundancy`` of ``head_keys`` ``[num_kv_heads, L, head_dim]``, fp32."""
    norms = torch.linalg.vector_norm(head_keys, dim=2, keepdim=True)
    lengths = norms + NORM_EPS
    diagonals = (norms / lengths).square().squeeze(2)
    column_sums = []
    # Head by head: the keys of one head stay in a CPU's cache, and each head has rows of its own left to scan.
    for head, (keys_of_head, lengths_of_head, diagonal) in enumerate(zip(head_keys, lengths, diagonals, strict=True)):
        unit = keys_of_head / lengths_of_head
        hits = () if prompt_hits is None else (prompt_hits.columns[0, head], prompt_hits.is_filled)
        column_sums.append(unit @ unit.sum(dim=0) - diagonal - exempt_sums(unit, threshold, *hits))
    return (torch.stack(column_sums) / head_keys.shape[1]).softmax(dim=-1)
