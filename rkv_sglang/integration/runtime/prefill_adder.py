"""Admission of waiting requests by SGLang's ``PrefillAdder``, with an exact reservation for those under a policy."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.prefixes.room import slots_to_come
from rkv_sglang.integration.runtime.prompts.pending import budget_after_prefill, note_admission, pending_budget
from rkv_sglang.integration.runtime.requests import state_of
from rkv_sglang.integration.runtime.restore import growth_after_prefill, host_copy_of, len_after_prefill
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.reservation import decode_growth, most_growth


def growth_of_waiting(req: Any) -> int | None:
    """Return by how much a waiting request can grow after its prefill; None if it asks for no policy."""
    runtime = get_runtime()
    config = runtime.config_of(req)
    if config is None:
        return None
    held = len_after_prefill(req)
    is_restored = host_copy_of(req) is not None
    growth = growth_after_prefill(req, held, is_restored=is_restored)
    is_pending = not is_restored and budget_after_prefill(runtime.parts, config, req, held) > 0
    return max(growth, _least_growth(req, held, is_pending)) + slots_to_come(req)


@contextlib.contextmanager
def _estimate(growth: int | None) -> Iterator[None]:
    """Cap the tokens that ``PrefillAdder`` expects of a waiting request at ``growth`` while this is entered."""
    from sglang.srt.managers import schedule_policy

    if growth is None:
        yield
        return
    stock = schedule_policy.CLIP_MAX_NEW_TOKENS
    schedule_policy.CLIP_MAX_NEW_TOKENS = growth
    try:
        yield
    finally:
        schedule_policy.CLIP_MAX_NEW_TOKENS = stock


@contextlib.contextmanager
def _exact_preemption(adder: Any, req: Any) -> Iterator[None]:
    """Have SGLang preempt for a request under a policy until what admission asks of it is free.

    ``PrefillAdder.preempt_to_schedule`` would not count pages, nor the prompt of a request that was never tried.
    """
    growth = growth_of_waiting(req)
    with _estimate(growth):
        if growth is None:
            yield
            return
        req.refresh_fill_ids()
        input_len = len(req.full_untruncated_fill_ids) - req.prefix_len
        expected = input_len + min(req.sampling_params.max_new_tokens, growth)
        missing = ceil_to_page(input_len + growth, adder.page_size) - expected
        adder.memory_budget.total_offset += missing
        try:
            yield
        finally:
            adder.memory_budget.total_offset -= missing


@contextlib.contextmanager
def _exact_reservation(adder: Any, req: Any) -> Iterator[None]:
    """Admit a request under a policy if its pages fit, and reserve all of them from then on.

    ``PrefillAdder.add_one_req`` would count a page more for each request (``per_req_token_overhead``), want something
    to be left, and expect no more growth than the request has tokens to generate (its query row may take more);
    ``add_chunked_req`` would reserve only the next chunk of a prompt.
    """
    growth = growth_of_waiting(req)
    with _estimate(growth):
        if growth is None:
            yield
            return
        budget, num_admitted = adder.memory_budget, len(adder.can_run_list)
        input_len = len(req.full_untruncated_fill_ids) - req.prefix_len
        expected = input_len + min(max(req.sampling_params.max_new_tokens - len(req.output_ids), 0), growth)
        needed = ceil_to_page(input_len + growth, adder.page_size)
        reserved_before = budget.total_offset
        budget.total_offset -= expected + adder.per_req_token_overhead + 1 - needed
        try:
            yield
        finally:
            budget.total_offset = reserved_before
            if len(adder.can_run_list) > num_admitted:
                budget.total_offset += needed
                note_admission(get_runtime().parts, req)


def _least_growth(req: Any, resident_len: int, is_prompt_pending: bool) -> int:
    """Return what must be reserved for a request however little it holds: there is one query row for that many tokens.

    Only a request with a budget of its own, below the server's, holds less, and one with a short answer, of which only
    the prompt is compacted. Alone in the pool it needs no more than the pool has: there is always one row.
    """
    runtime = get_runtime()
    config = runtime.config_of(req)
    if runtime.looks_at_nothing:
        # No rows.
        return 0
    if config is None:
        return 0
    is_small = config.capacity < runtime.config.capacity and runtime.may_compact(req)
    if not is_small and not is_prompt_pending:
        return 0
    most = most_growth(resident_len, runtime.parts.pool_size_for(req))
    return max(min(runtime.config.capacity + state_of(req).held_prompt_len - resident_len, most), 0)


@contextlib.contextmanager
def _one_estimate_for_all(req: Any) -> Iterator[None]:
    """Keep a request from ``PrefillAdder.add_one_req_ignore_eos``, the way of counting without a radix cache.

    That one counts tokens generated as tokens held, of every running request.
    """
    params = req.sampling_params
    stock, params.ignore_eos = params.ignore_eos, False
    try:
        yield
    finally:
        params.ignore_eos = stock


@contextlib.contextmanager
def _in_one_piece(adder: Any, req: Any) -> Iterator[None]:
    """Admit a request that is to be restored whole, and charge it for the one token it computes.

    ``PrefillAdder.add_one_req`` would cut it where a chunk of prefill ends, as if its other tokens were computed too.
    """
    copy = host_copy_of(req)
    if copy is None:
        yield
        return
    chunk_tokens, input_tokens = adder.rem_chunk_tokens, adder.rem_input_tokens
    num_logged, num_reprocessed = adder.log_input_tokens, adder.reprocessed_log_input_tokens
    num_admitted = len(adder.can_run_list)
    adder.rem_chunk_tokens, adder.rem_input_tokens = None, sys.maxsize
    try:
        yield
    finally:
        num_computed = len(adder.can_run_list) - num_admitted
        charge = num_computed * adder.page_size
        adder.rem_chunk_tokens = None if chunk_tokens is None else chunk_tokens - charge
        adder.rem_input_tokens = input_tokens - charge
        adder.log_input_tokens = num_logged + num_computed
        adder.reprocessed_log_input_tokens = num_reprocessed + num_computed


@functools.cache
def adder_class(base: Any) -> Any:
    """Return SGLang's ``PrefillAdder`` with exact reservations for requests under a policy."""

    class PolicyPrefillAdder(base):  # type: ignore[misc]
        """Admits what fits; requests without a policy keep SGLang's estimates."""

        _counted_for_preemption: set[int] | None = None

        def _get_running_request_total_token_offset(self, req: Any) -> float:
            config = get_runtime().config_of(req)
            if config is None:
                return float(super()._get_running_request_total_token_offset(req))
            held = req.kv.kv_allocated_len
            runtime = get_runtime()
            prompt_budget = pending_budget(runtime.parts, config, req)
            growth = decode_growth(
                config,
                prompt_len=state_of(req).held_prompt_len,
                resident_len=held,
                tokens_left=req.sampling_params.max_new_tokens - len(req.output_ids),
                decode_steps=req.decode_batch_idx,
                prompt_budget=prompt_budget,
                page_size=runtime.page_size,
            )
            growth = max(growth, _least_growth(req, held, prompt_budget > 0)) + slots_to_come(req)
            reserved = ceil_to_page(held + growth, self.page_size) - ceil_to_page(held, self.page_size)
            if self._counted_for_preemption is not None and id(req) not in self._counted_for_preemption:
                # preempt_to_schedule asks first what preempting the request would bring and later what was reserved
                # for it. A request at its budget reserves little, but gives back all it holds.
                self._counted_for_preemption.add(id(req))
                return float(reserved + ceil_to_page(held, self.page_size) - req.kv.cache_protected_len)
            return float(reserved)

        def add_one_req(self, req: Any, *args: Any, **kwargs: Any) -> Any:
            with _exact_reservation(self, req), _one_estimate_for_all(req), _in_one_piece(self, req):
                return super().add_one_req(req, *args, **kwargs)

        def add_chunked_req(self, req: Any) -> Any:
            with _exact_reservation(self, req):
                return super().add_chunked_req(req)

        def preempt_to_schedule(self, req: Any) -> Any:
            self._counted_for_preemption = set()
            try:
                with _exact_preemption(self, req):
                    return super().preempt_to_schedule(req)
            finally:
                self._counted_for_preemption = None

    return PolicyPrefillAdder
