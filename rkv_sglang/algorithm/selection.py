"""From scores to the sorted indices of the tokens to keep, per KV head."""

import torch
from torch import Tensor

from rkv_sglang.algorithm.validation import check_selection


def select_kept(scores: Tensor, prompt_len: int, window: int, budget: int) -> Tensor:
    """Per KV head, the top ``budget - window`` generated tokens before the window, and the window.

    Reads no tensor data on the host, so it queues no device-to-host sync. NaN ranks above every number: the result
    is still a valid set of indices.

    Args:
        scores: ``[num_kv_heads, L - window]``, floating; the first ``prompt_len`` columns are not candidates.
        prompt_len: Tokens of the prompt; they are kept anyway and are not counted.
        window: Most recent tokens, kept whatever their score.
        budget: Tokens kept, the window included.

    Returns:
        Indices into the generated tokens (position less ``prompt_len``), ``[num_kv_heads, budget]``, int64, ascending.
        Of equal scores the earlier token wins.

    Raises:
        ValueError: A shape or dtype differs from the above, or there are fewer candidates than ``budget - window``.

    Reference: ``rkv_sglang.algorithm.reference.select_kept``.
    """
    check_selection(scores, prompt_len, window, budget)
    candidates = scores[:, prompt_len:]
    num_kv_heads, num_candidates = candidates.shape
    # Not topk: it leaves the choice among equal scores open, and ranks and devices must choose alike.
    best_first = candidates.argsort(dim=1, descending=True, stable=True)
    best = best_first[:, : budget - window].sort(dim=1).values
    window_indices = torch.arange(num_candidates, num_candidates + window, device=scores.device)
    return torch.cat([best, window_indices.expand(num_kv_heads, window)], dim=1)
