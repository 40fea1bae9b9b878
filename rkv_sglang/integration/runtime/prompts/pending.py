"""Which prompts are still to be compacted, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rkv_sglang.integration.runtime.requests import state_of
from rkv_sglang.sizes.lengths import decodes_again
from rkv_sglang.sizes.reservation import prompt_budget_after

if TYPE_CHECKING:
    from rkv_sglang.integration.runtime.runtime import Runtime


def budget_after_prefill(runtime: Runtime, req: Any, prefilled_len: int) -> int:
    """Return what will be kept of a request's prompt after a prefill that leaves it so many tokens; 0: it stays."""
    config = runtime.config_of(req)
    if config is None or config.prompt_budget == 0:
        return 0
    pool_size = runtime.parts.scheduler.max_total_num_tokens
    return prompt_budget_after(config, state_of(req), prefilled_len, pool_size, runtime.page_size)


def pending_budget(runtime: Runtime, req: Any) -> int:
    """Return what will be kept of a running request's prompt, if it is still to be compacted; else 0."""
    if state_of(req).evicted_tokens > 0:
        return 0
    return budget_after_prefill(runtime, req, req.kv.kv_allocated_len - req.decode_batch_idx)


def is_due(runtime: Runtime, req: Any) -> bool:
    """Decide whether a request's prompt is compacted before the next step."""
    if req.finished() or not req.kv.holds_kv or req.decode_batch_idx < runtime.config.window:
        return False
    return pending_budget(runtime, req) > 0 and decodes_again(state_of(req), req.kv.kv_allocated_len)
