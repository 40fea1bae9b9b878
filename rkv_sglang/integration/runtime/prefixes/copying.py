"""The choice of what stays of a document, per layer and KV head or in blocks, and its copy into slots of its own."""

from __future__ import annotations

import torch

from rkv_sglang.cache.block_choice import kept_tokens
from rkv_sglang.cache.compact import DueRequest
from rkv_sglang.integration.runtime.drop import ways_of
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.prefixes.judging import Verdict
from rkv_sglang.integration.runtime.prompts.blocks import copying
from rkv_sglang.integration.runtime.prompts.heads import compacting
from rkv_sglang.kernels.transfer import sent
from rkv_sglang.sizes.prompt_plan import PrefixPlan


def keep_heads(
    parts: Parts,
    plan: PrefixPlan,
    verdict: Verdict,
    slots: torch.Tensor,
    new_slots: torch.Tensor,
    window: int,
    *,
    wants_indices: bool,
) -> torch.Tensor | None:
    """Copy what every layer and head keeps, on the current stream.

    Mutates the pool in ``new_slots`` alone.

    Args:
        slots: Of the document and the tokens that are scored with it, ``[plan.resident_len]``, int64.
        new_slots: ``[plan.budget]``, int64.
        window: Last tokens of the document that stay.

    Returns:
        What was kept, ascending, ``[num_layers, num_kv_heads, plan.budget]``, int64; None unless wanted.
    """
    scored = parts.scored
    assert scored is not None, "what every head keeps is chosen by scores"
    kept: torch.Tensor | None = compacting(parts.scheduler.tree_cache)(
        scored.buffers,
        [DueRequest(plan, slots, plan.resident_len, wants_indices=wants_indices)],
        [new_slots],
        verdict.read_queries,
        verdict.policy,
        window,
        query_bytes=scored.request_bytes,
        model=scored.attention,
    )[0]
    return kept


def keep_blocks(
    parts: Parts,
    plan: PrefixPlan,
    verdict: Verdict,
    slots: torch.Tensor,
    new_slots: torch.Tensor,
    window: int,
    *,
    wants_indices: bool,
    block: int,
) -> torch.Tensor | None:
    """Copy what all layers and heads keep, on the current stream; as ``keep_heads``, and ``[1, 1, plan.budget]``."""
    ways, of_blocks = ways_of(parts.scheduler.tree_cache), plan.of_blocks(window, block)
    if parts.scored is None:
        (choice,) = ways.choose_by_place([(of_blocks, plan.resident_len, None)], verdict.policy, window)
    else:
        scored = parts.scored
        (choice,) = ways.choose_by_scores(
            scored.buffers,
            [DueRequest(of_blocks, slots, plan.resident_len)],
            verdict.read_queries,
            verdict.policy,
            window,
            query_bytes=scored.request_bytes,
            model=scored.attention,
        )
    # The task stays in the slots where it is.
    kept = sent(kept_tokens(of_blocks, choice)[: plan.budget], slots.device)
    copying(parts)(slots[kept], new_slots)
    return kept[None, None] if wants_indices else None
