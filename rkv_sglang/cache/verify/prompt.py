"""A prompt's compaction with its copies checked: what is shared must not change, and what is kept must arrive."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest
from rkv_sglang.cache.verify.recomputed import CompactionDiffersError, checksums, rows_of
from rkv_sglang.config import NUM_FIRST_KEPT
from rkv_sglang.sizes.prompt_plan import PromptPlan


def compact_prompts_and_verify(
    compact: Callable[..., list[Tensor | None]],
    shared_slots: Tensor,
    buffers: KVBuffers,
    requests: Sequence[DueRequest[PromptPlan]],
    new_slots: Sequence[Tensor],
    *args: Any,
    **kwargs: Any,
) -> list[Tensor | None]:
    """Call ``compact`` (``prompt.compact_prompts``) with the other arguments; check what it kept and where that went.

    Args:
        shared_slots: As in ``compact_and_verify``; neither they nor what the requests held may change.

    Raises:
        CompactionDiffersError: At the first difference.
    """
    held = torch.cat([shared_slots, *(request.slots for request in requests)])
    before = checksums(buffers, held)
    asked = [replace(request, wants_indices=True) for request in requests]
    results = compact(buffers, asked, new_slots, *args, **kwargs)
    if checksums(buffers, held) != before:
        raise CompactionDiffersError("a prompt's compaction wrote slots that were in use; please report this")
    window = args[2]
    for request, slots, kept in zip(requests, new_slots, results, strict=True):
        plan = request.plan
        always = [*range(NUM_FIRST_KEPT), *range(plan.prompt_len - window, plan.prompt_len)]
        is_whole = kept is not None and kept.shape[2] == plan.budget and bool((kept.diff(dim=2) > 0).all())
        if kept is None or not is_whole or not all(bool((kept == place).any(dim=2).all()) for place in always):
            raise CompactionDiffersError(
                f"a prompt of {plan.prompt_len} tokens was compacted to {plan.budget}: they are not ascending, or its "
                "first or last ones are not among them; please report this"
            )
        generated = torch.arange(plan.prompt_len, plan.resident_len, device=kept.device)
        sources = torch.cat([kept, generated.expand(*kept.shape[:2], -1)], dim=2).transpose(1, 2).unsqueeze(3)
        for was, now in zip(rows_of(buffers, request.slots), rows_of(buffers, slots), strict=True):
            moved = was.take_along_dim(sources, dim=1).contiguous()
            if not torch.equal(moved.view(torch.uint8), now.contiguous().view(torch.uint8)):
                raise CompactionDiffersError("a prompt's copy is not what was kept of it; please report this")
    return [kept if request.wants_indices else None for request, kept in zip(requests, results, strict=True)]
