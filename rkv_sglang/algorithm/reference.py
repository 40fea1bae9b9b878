"""The R-KV score and selection as the paper words them: the oracle of every faster version.

Written for reading, not for speed: explicit loops and the full L x L matrix. The faster versions in ``scoring`` and
``selection`` have the same names, arguments and results. Source: R-KV, arXiv 2505.24133.
"""

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.validation import (
    check_kernel_size,
    check_keys,
    check_mix_lambda,
    check_queries,
    check_selection,
    check_threshold,
)

NORM_EPS = 1e-8


def importance(
    queries: Tensor,
    keys: Tensor,
    kernel_size: int,
    *,
    model: ModelAttention = PLAIN_ATTENTION,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attention that the window pays to each earlier token, max-pooled over neighbours in time.

    Args:
        queries: Post-RoPE queries of the last tokens, oldest first, ``[window, num_qo_heads, head_dim]``, floating.
            Query heads ``g * G`` to ``g * G + G - 1`` share KV head ``g``.
        keys: Keys as cached, temporal order, ``[L, num_kv_heads, head_dim]``, floating.
        kernel_size: Width of the max-pool, odd; stride 1, padded with -inf.
        model: How logits are made of products.
        dtype: Type of the arithmetic and of the result; float64 makes it an arbiter between fp32 results.

    Returns:
        ``[num_kv_heads, L - window]``, ``dtype``.

    Raises:
        ValueError: A shape, dtype, device or value differs from the above.
    """
    check_keys(keys)
    check_queries(queries, keys)
    check_kernel_size(kernel_size)
    window, num_qo_heads, head_dim = queries.shape
    num_tokens, num_kv_heads, _ = keys.shape
    group_size = num_qo_heads // num_kv_heads
    num_scored = num_tokens - window
    queries, keys = queries.to(dtype), keys.to(dtype)

    pooled = torch.empty(num_kv_heads, num_scored, dtype=dtype, device=keys.device)
    for kv_head in range(num_kv_heads):
        mean_attention = torch.zeros(num_scored, dtype=dtype, device=keys.device)
        for step in range(window):
            group = queries[step, kv_head * group_size : (kv_head + 1) * group_size]
            logits = model.logits(group @ keys[:num_scored, kv_head].T, head_dim)
            mean_attention += logits.amax(dim=0).softmax(dim=0) / window
        reach = kernel_size // 2
        for j in range(num_scored):
            pooled[kv_head, j] = mean_attention[max(0, j - reach) : j + reach + 1].max()
    return pooled


def redundancy(keys: Tensor, threshold: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """How much each token's key repeats the others, as a softmax over all tokens.

    The diagonal of the cosine matrix is set to 0 before the threshold test, so below a threshold of 0 a token may be
    its own most recent near-duplicate; a row with no entry above the threshold exempts column 0.

    Args:
        keys: Keys as cached, temporal order, ``[L, num_kv_heads, head_dim]``, floating.
        threshold: Cosine above which two keys are near-duplicates.
        dtype: Type of the arithmetic and of the result; float64 makes it an arbiter between fp32 results.

    Returns:
        ``[num_kv_heads, L]``, ``dtype``; every row sums to 1.

    Raises:
        ValueError: A shape, dtype or value differs from the above.
    """
    check_keys(keys)
    check_threshold(threshold)
    keys = keys.to(dtype)
    rows = []
    for kv_head in range(keys.shape[1]):
        head_keys = keys[:, kv_head]
        unit = head_keys / (head_keys.norm(dim=1, keepdim=True) + NORM_EPS)
        similarity = unit @ unit.T
        similarity.fill_diagonal_(0.0)
        for i in range(len(similarity)):
            near_duplicates = (similarity[i] > threshold).nonzero().flatten().tolist()
            most_recent = near_duplicates[-1] if near_duplicates else 0
            similarity[i, most_recent] = 0.0
        rows.append(similarity.mean(dim=0).softmax(dim=0))
    return torch.stack(rows)


def rkv_scores(
    queries: Tensor,
    keys: Tensor,
    *,
    mix_lambda: float,
    kernel_size: int,
    similarity_threshold: float,
    model: ModelAttention = PLAIN_ATTENTION,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Score of each token before the window: ``mix_lambda * importance - (1 - mix_lambda) * redundancy``.

    Args:
        queries: As in ``importance``.
        keys: As in ``importance``.
        mix_lambda: Weight of importance, in [0, 1].
        kernel_size: As in ``importance``.
        similarity_threshold: As in ``redundancy``, which takes its softmax over all L tokens.
        model: As in ``importance``.
        dtype: Type of the arithmetic and of the result.

    Returns:
        ``[num_kv_heads, L - window]``, ``dtype``; higher means keep.

    Raises:
        ValueError: A shape, dtype, device or value differs from the above.
    """
    check_mix_lambda(mix_lambda)
    important = importance(queries, keys, kernel_size, model=model, dtype=dtype)
    redundant = redundancy(keys, similarity_threshold, dtype=dtype)
    num_scored = keys.shape[0] - queries.shape[0]
    return mix_lambda * important - (1.0 - mix_lambda) * redundant[:, :num_scored]


def select_kept(scores: Tensor, prompt_len: int, window: int, budget: int) -> Tensor:
    """Per KV head, the top ``budget - window`` generated tokens before the window, and the window.

    Args:
        scores: ``[num_kv_heads, L - window]``, floating, no NaN; the first ``prompt_len`` columns are not candidates.
        prompt_len: Tokens of the prompt; they are kept anyway and are not counted.
        window: Most recent tokens, kept whatever their score.
        budget: Tokens kept, the window included.

    Returns:
        Indices into the generated tokens (position less ``prompt_len``), ``[num_kv_heads, budget]``, int64, ascending.
        Of equal scores the earlier token wins.

    Raises:
        ValueError: A shape or dtype differs from the above, or there are fewer candidates than ``budget - window``.
    """
    check_selection(scores, prompt_len, window, budget)
    kept = []
    for head_scores in scores.tolist():
        candidates = head_scores[prompt_len:]
        best_first = sorted(range(len(candidates)), key=lambda index: (-candidates[index], index))
        window_indices = range(len(candidates), len(candidates) + window)
        kept.append(sorted([*best_first[: budget - window], *window_indices]))
    return torch.tensor(kept, dtype=torch.int64, device=scores.device).reshape(len(kept), budget)
