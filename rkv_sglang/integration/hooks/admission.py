"""Hooks on admission: requests are taken in, and limited in length, by what they hold, not by all they write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import (
    ADDER,
    ENVS,
    MANAGERS,
    MODEL_CONFIG,
    PARALLEL,
    REQ,
    REQ_KV,
    SAMPLING_PARAMS,
    SCHEDULER,
    TREE,
)
from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.prefill_adder import adder_class
from rkv_sglang.integration.runtime.prefixes.named import gap_of
from rkv_sglang.integration.runtime.prefixes.reading import read_prefix
from rkv_sglang.integration.runtime.prefixes.room import limit_new_tokens
from rkv_sglang.integration.runtime.requests import num_carried_tokens
from rkv_sglang.sizes.lengths import can_ever_compact
from rkv_sglang.sizes.reservation import most_growth


def use_exact_adder(result: Any, scheduler: Any) -> Any:
    """Have the scheduler admit by what requests under a policy really need."""
    return adder_class(result)


def set_limits(limit: Callable[..., None], scheduler: Any, req: Any) -> None:
    """Read what a request asks of the policy, and let it generate up to the model's context if the pool allows.

    The pool allows it if it holds all that the request holds at a time.
    """
    params, runtime = req.sampling_params, get_runtime()
    asked, min_new_tokens = params.max_new_tokens, params.min_new_tokens
    try:
        runtime.read_request(req)
        if req.to_finish is None and not req.finished():
            read_prefix(runtime.parts, req, runtime.config)
    except ValueError as error:
        # The client gets it as status 400. One that SGLang refused before has lost its tokens, and keeps its reason.
        if req.to_finish is None:
            req.set_finish_with_abort(str(error))
    limit(scheduler, req)
    if req.to_finish is not None or req.finished():
        return
    limit_new_tokens(runtime.parts, req)
    config = runtime.config_of(req)
    input_len, gap = len(req.origin_input_ids), gap_of(req)
    # The bound of Scheduler.init_req_max_new_tokens, with the context alone in the place of max_req_len, which is the
    # smaller of context and pool.
    most = scheduler.model_config.context_len - 2 - input_len - gap
    if gap > 0:
        params.max_new_tokens = min(params.max_new_tokens, most)
        params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)
    if config is None:
        return
    if asked is not None:
        most = min(most, asked)
    if scheduler.max_new_tokens_limit is not None and scheduler.max_new_tokens_limit > 0:
        most = min(most, scheduler.max_new_tokens_limit)
    carried = num_carried_tokens(req)
    # What it can grow by before its first compaction, which waits for a window of queries.
    growth = max(config.capacity - carried, config.window)
    if (
        most > params.max_new_tokens
        and can_ever_compact(config, most + carried)
        and growth <= most_growth(input_len, runtime.parts.pool_size_for(req))
    ):
        params.max_new_tokens = most
        params.min_new_tokens = min(min_new_tokens, most)
    if carried > 0 and runtime.may_compact(req):
        # Compaction will write where an earlier answer stands.
        req.skip_radix_cache_insert = True


ADMISSION_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        kind="AROUND",
        function=set_limits,
        signature="(self, req)",
        why=(
            "SGLang clips what a request may generate at the size of the pool, as if every token stayed; and here a "
            "request's own settings are read, before anything depends on them."
        ),
        upstream="A bound on what a request holds at a time, asked of the KV policy.",
        uses=(
            *names(SCHEDULER, "model_config max_new_tokens_limit max_total_num_tokens"),
            *names(REQ, "beam_group finished origin_input_ids sampling_params set_finish_with_abort to_finish"),
            f"{REQ}.multimodal_inputs",
            f"{MANAGERS}.schedule_batch.MultimodalInputs.mm_items",
            f"{MANAGERS}.schedule_batch.MultimodalDataItem.offsets",
            f"{REQ}.skip_radix_cache_insert",
            # Of named prefixes.
            *names(REQ, "cache_salt extra_key lora_id positional_embed_overrides session"),
            *names(SCHEDULER, "chunked_req"),
            *names(TREE, "disable"),
            *names(PARALLEL, "dp_size tp_size"),
            f"{ENVS}.SGLANG_RADIX_FORCE_MISS",
            *names(SAMPLING_PARAMS, "custom_params max_new_tokens min_new_tokens"),
            f"{MODEL_CONFIG}.context_len",
        ),
        surroundings=(f"{SCHEDULER}.handle_generate_request",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class",
        kind="AFTER",
        function=use_exact_adder,
        signature="(self)",
        why="Admission would reserve room for every token a request may generate, and leave the freed room empty.",
        upstream="PrefillAdder asks the KV policy how much a request can still grow.",
        uses=(
            "sglang.srt.managers.schedule_policy.CLIP_MAX_NEW_TOKENS",
            *names(ADDER, "_get_running_request_total_token_offset add_chunked_req add_one_req preempt_to_schedule"),
            *names(
                ADDER, "can_run_list memory_budget page_size per_req_token_overhead rem_chunk_tokens rem_input_tokens"
            ),
            *names(ADDER, "log_input_tokens reprocessed_log_input_tokens"),
            "sglang.srt.mem_cache.prefill_budget.PrefillBudget.total_offset",
            *names(REQ, "decode_batch_idx full_untruncated_fill_ids kv output_ids prefix_len refresh_fill_ids"),
            *names(REQ_KV, "cache_protected_len kv_allocated_len"),
            f"{SAMPLING_PARAMS}.ignore_eos",
        ),
        surroundings=names(ADDER, "add_one_req_ignore_eos budget_state"),
    ),
)
