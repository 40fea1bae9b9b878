"""Scores that depend on a token's place alone, in torch: every layer and head gets the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.transfer import to_device


@dataclass(frozen=True)
class Places:
    """Where each column of a ragged result lies in its request; all ``[num_tokens]``, int64.

    Attributes:
        tokens: Index in its request, from 0.
        kv_lens: Resident tokens of its request.
        shifts: Of its request, the entry of ``per_request``.
    """

    tokens: Tensor
    kv_lens: Tensor
    shifts: Tensor


def places_of(batch: PagedBatch, per_request: Sequence[int]) -> Places:
    """Return the places of all tokens, with one number of each request beside them. Queues no sync."""
    device = batch.device
    lens = batch.token_indptr.diff()
    request = torch.repeat_interleave(
        torch.arange(batch.num_requests, device=device), lens, output_size=batch.num_tokens
    )
    tokens = torch.arange(batch.num_tokens, device=device) - batch.token_indptr[request]
    return Places(tokens, lens[request], to_device(per_request, torch.int64, device)[request])


def spread(scores: Tensor, places: Places, keys: PagedBuffers, window: int) -> Tensor:
    """Return ``scores`` of the tokens for every layer and head, -inf in the window.

    Args:
        scores: ``[num_tokens]``, fp32.

    Returns:
        ``[num_layers, num_kv_heads, num_tokens]``, fp32, contiguous.
    """
    scored = scores.masked_fill(places.tokens >= places.kv_lens - window, -torch.inf)
    return scored.expand(keys.num_layers, keys.num_kv_heads, -1).contiguous()
