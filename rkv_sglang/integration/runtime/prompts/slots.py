"""Slots of the KV pool for a request that is already running, or comes back: as a prefill would get them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def alloc_slots(scheduler: Any, shared: torch.Tensor | None, total_len: int) -> torch.Tensor:
    """Take slots for the tokens of a row past the shared ones, ``[total_len - len(shared)]``, int64.

    Raises:
        RuntimeError: The pool has not so many; admission saw to it that it has.
    """
    from sglang.srt.mem_cache.allocation import alloc_paged_token_slots_extend, alloc_token_slots

    tree_cache, device = scheduler.tree_cache, scheduler.device
    matched_len = 0 if shared is None else len(shared)
    slots: torch.Tensor
    if tree_cache.page_size == 1:
        slots = alloc_token_slots(tree_cache, total_len - matched_len)
        return slots
    before, after = torch.tensor([matched_len]), torch.tensor([total_len])
    last = torch.tensor([-1], device=device) if shared is None else shared[-1:]
    slots = alloc_paged_token_slots_extend(
        tree_cache=tree_cache,
        prefix_lens=before.to(device),
        prefix_lens_cpu=before,
        seq_lens=after.to(device),
        seq_lens_cpu=after,
        last_loc=last,
        extend_num_tokens=total_len - matched_len,
    )
    return slots


def sides_of(pool: Any) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Return each layer's keys and values; with MLA its latents, and nothing beside them."""
    return (pool.kv_buffer, ()) if hasattr(pool, "kv_buffer") else (pool.k_buffer, pool.v_buffer)
