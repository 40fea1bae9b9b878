"""Report of a server's memory at start-up, and warnings of flags that waste it."""

from __future__ import annotations

import logging
from typing import Any

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.memory_plan import requests_at_once

logger = logging.getLogger(__name__)

# The request that the start-up line speaks of: a question, and a long chain of thought.
PROMPT_LEN = 512
OUTPUT_LEN = 16384


def report_memory(scheduler: Any, config: PolicyConfig, *, side_bytes: int, num_query_rows: int) -> None:
    """Log the pool, the side buffers and the concurrency they give; warn where another flag wastes it.

    Args:
        scheduler: SGLang's scheduler, built.
        config: The server's settings.
        side_bytes: Bytes of the policy's own buffers on this rank.
        num_query_rows: Requests whose queries can be recorded at a time.
    """
    pool_size, page_size = scheduler.max_total_num_tokens, scheduler.page_size
    output_len = max(min(OUTPUT_LEN, scheduler.model_config.context_len - PROMPT_LEN), config.capacity)
    counts = {
        name: requests_at_once(
            pool_size, prompt_len=PROMPT_LEN, output_len=output_len, page_size=page_size, config=settings
        )
        for name, settings in (("with", config), ("without", None))
    }
    logger.info(
        "KV policy %s: budget %d + buffer %d tokens per request, layer and KV head; KV pool %d tokens, side buffers "
        "%.1f MiB (%d query rows); it holds %d requests of %d + %d tokens at once, %d without the policy",
        config.policy,
        config.budget,
        config.buffer,
        pool_size,
        side_bytes / 2**20,
        num_query_rows,
        counts["with"],
        PROMPT_LEN,
        output_len,
        counts["without"],
    )
    warnings = capacity_warnings(
        counts["with"], max_running_requests=scheduler.max_running_requests, max_graph_bs=_max_graph_bs(scheduler)
    )
    for warning in (*pool_warnings(config, pool_size), *warnings):
        logger.warning(warning)


def pool_warnings(config: PolicyConfig, pool_size: int) -> list[str]:
    """Return one line if a pool of so many tokens is too small for any request to be compacted."""
    # A request is compacted when it holds so many generated tokens, and at least one of a prompt.
    if config.capacity < pool_size:
        return []
    return [
        f"The KV pool of {pool_size} tokens cannot hold a prompt and --kv-budget {config.budget} plus --kv-buffer "
        f"{config.buffer} generated tokens, so nothing will ever be compacted: set them lower, or make the pool larger"
    ]


def capacity_warnings(count: int, *, max_running_requests: int, max_graph_bs: int | None) -> list[str]:
    """Return one line for each flag that keeps ``count`` requests at once from running, or from running fast."""
    warnings = []
    if max_running_requests < count:
        warnings.append(
            f"The KV pool holds {count} requests of {PROMPT_LEN} prompt tokens at once under the KV policy, but only "
            f"{max_running_requests} may run: set --max-running-requests {count}"
        )
    running = min(count, max_running_requests)
    if max_graph_bs is not None and max_graph_bs < running:
        warnings.append(
            f"Up to {running} requests run at once under the KV policy, but CUDA graphs are captured for at most "
            f"{max_graph_bs}, so larger batches decode without one: set --cuda-graph-max-bs-decode {running}"
        )
    return warnings


def _max_graph_bs(scheduler: Any) -> int | None:
    """Return the largest batch that decodes in a CUDA graph; None where there are no graphs."""
    from sglang.srt.runtime_context import get_exec

    decode = get_exec().graph.cuda_graph_config.decode
    if not str(scheduler.device).startswith("cuda") or str(decode.backend) == "disabled":
        return None
    return int(decode.max_bs) if decode.max_bs else None
