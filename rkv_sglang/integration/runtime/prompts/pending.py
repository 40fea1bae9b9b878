"""Questions about prompts that are still to be compacted: whether, to what, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.requests import state_of
from rkv_sglang.sizes.lengths import decodes_again
from rkv_sglang.sizes.reservation import prompt_budget_after

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def budget_after_prefill(
    parts: Parts, config: PolicyConfig | None, req: Req, prefilled_len: int, pool_size: int | None = None
) -> int:
    """Return what will be kept of a request's prompt after a prefill that leaves it so many tokens; 0: it stays whole.

    Args:
        config: The request's own.
        pool_size: What the pool has for it. None: what it had when the request was admitted, or has now; named prefixes
            that are made or deleted later change nothing for one that runs.
    """
    # SGLang looks an image's tokens and positions up by their places in the prompt.
    if config is None or config.prompt_budget == 0 or req.multimodal_inputs is not None:
        return 0
    allocator: Any = parts.scheduler.token_to_kv_pool_allocator
    state = state_of(req)
    if pool_size is None:
        pool_size = parts.pool_size_for(req) if state.pool_size is None else state.pool_size
    return prompt_budget_after(config, state, prefilled_len, pool_size, allocator.page_size)


def note_admission(parts: Parts, req: Req) -> None:
    """Decide for one that is about to be prefilled what the pool has for it: until it is prefilled anew."""
    state = state_of(req)
    if state.pool_size is None:
        state.pool_size = parts.pool_size_for(req)


def pending_budget(parts: Parts, config: PolicyConfig | None, req: Req) -> int:
    """Return what will be kept of a running request's prompt, if it is still to be compacted; else 0."""
    if state_of(req).evicted_tokens > 0:
        return 0
    return budget_after_prefill(parts, config, req, req.kv.kv_allocated_len - req.decode_batch_idx)


def is_due(parts: Parts, config: PolicyConfig | None, req: Req) -> bool:
    """Decide whether a request's prompt is compacted before the next step."""
    if config is None or req.finished() or not req.kv.holds_kv or req.decode_batch_idx < config.window:
        return False
    return pending_budget(parts, config, req) > 0 and decodes_again(state_of(req), req.kv.kv_allocated_len)
