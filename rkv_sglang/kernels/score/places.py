"""Scores that depend on a token's place alone, in torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.transfer import to_device
from rkv_sglang.policies import Places


def places_of(batch: PagedBatch, logical_lens: Sequence[int]) -> Places:
    """Return the places of all tokens, requests of so many tokens ever seen. Queues no sync."""
    device = batch.device
    lens = batch.token_indptr.diff()
    request = torch.repeat_interleave(
        torch.arange(batch.num_requests, device=device), lens, output_size=batch.num_tokens
    )
    indices = torch.arange(batch.num_tokens, device=device) - batch.token_indptr[request]
    return Places(indices, lens[request], to_device(logical_lens, torch.int64, device)[request])


def spread(scores: Tensor, places: Places, keys: PagedBuffers, window: int) -> Tensor:
    """Return ``scores`` of the tokens for every layer and head, -inf in the window.

    Args:
        scores: ``[num_tokens]``, or ``[num_layers, num_kv_heads, num_tokens]``, fp32.

    Returns:
        ``[num_layers, num_kv_heads, num_tokens]``, fp32, contiguous.
    """
    scored = scores.masked_fill(places.indices >= places.kv_lens - window, -torch.inf)
    return scored.expand(keys.num_layers, keys.num_kv_heads, -1).contiguous()
