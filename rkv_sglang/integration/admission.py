"""What a request under a policy costs the scheduler: an exact reservation, and no clip at the pool's size."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from rkv_sglang.cache.lengths import can_ever_compact
from rkv_sglang.cache.plan import ceil_to_page
from rkv_sglang.cache.reservation import decode_growth, fits_pool, most_growth
from rkv_sglang.integration.hook import Hook
from rkv_sglang.integration.process import get_runtime
from rkv_sglang.integration.restore import can_be_admitted, growth_after_prefill, host_copy_of, len_after_prefill


@contextlib.contextmanager
def _estimate(req: Any) -> Iterator[None]:
    """Within it, SGLang's cap on the tokens it expects of a waiting request is what this one will need."""
    from sglang.srt.managers import schedule_policy

    config = get_runtime().settings_of(req)
    if config is None:
        yield
        return
    stock = schedule_policy.CLIP_MAX_NEW_TOKENS
    held = len_after_prefill(req)
    schedule_policy.CLIP_MAX_NEW_TOKENS = max(growth_after_prefill(req, held), _least_growth(req, held))
    try:
        yield
    finally:
        schedule_policy.CLIP_MAX_NEW_TOKENS = stock


def _least_growth(req: Any, resident_len: int) -> int:
    """Return what must be reserved for a request however little it holds: there is one query row for that many tokens.

    Only a request with a budget of its own, below the server's, holds less. Alone in the pool it needs no more than
    the pool has: there is always one row.
    """
    runtime = get_runtime()
    config = runtime.settings_of(req)
    if config is None or config.capacity >= runtime.config.capacity or not runtime.may_compact(req):
        return 0
    scheduler = runtime.scheduler
    assert scheduler is not None
    most = most_growth(resident_len, scheduler.max_total_num_tokens, scheduler.page_size)
    return max(min(runtime.config.capacity + len(req.origin_input_ids) - resident_len, most), 0)


@contextlib.contextmanager
def _one_estimate_for_all(req: Any) -> Iterator[None]:
    """Within it, the request does not take SGLang's other way of counting (``ignore_eos`` without a radix cache).

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
    """Within it, a request that is to be restored is admitted whole, and charged for the one token it computes.

    SGLang would cut it where a chunk of prefill ends, as if its other tokens were computed too.
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
            config = get_runtime().settings_of(req)
            if config is None:
                return float(super()._get_running_request_total_token_offset(req))
            held = req.kv.kv_allocated_len
            growth = decode_growth(
                config,
                prompt_len=len(req.origin_input_ids),
                resident_len=held,
                tokens_left=req.sampling_params.max_new_tokens - len(req.output_ids),
                decode_steps=req.decode_batch_idx,
            )
            growth = max(growth, _least_growth(req, held))
            reserved = ceil_to_page(held + growth, self.page_size) - ceil_to_page(held, self.page_size)
            if self._counted_for_preemption is not None and id(req) not in self._counted_for_preemption:
                # SGLang asks first what preempting the request would bring and later what was reserved for it. A
                # request at its budget reserves little, but gives back all it holds.
                self._counted_for_preemption.add(id(req))
                return float(reserved + ceil_to_page(held, self.page_size) - req.kv.cache_protected_len)
            return float(reserved)

        def add_one_req(self, req: Any, *args: Any, **kwargs: Any) -> Any:
            with _estimate(req), _one_estimate_for_all(req), _in_one_piece(self, req):
                return super().add_one_req(req, *args, **kwargs)

        def add_chunked_req(self, req: Any) -> Any:
            with _estimate(req):
                return super().add_chunked_req(req)

        def preempt_to_schedule(self, req: Any) -> Any:
            self._counted_for_preemption = set()
            try:
                with _estimate(req):
                    return super().preempt_to_schedule(req)
            finally:
                self._counted_for_preemption = None

    return PolicyPrefillAdder


def use_exact_adder(result: Any, scheduler: Any) -> Any:
    """Have the scheduler admit by what requests under a policy really need."""
    return adder_class(result)


def set_limits(limit: Callable[..., None], scheduler: Any, req: Any) -> None:
    """Read what a request asks of the policy, and let it generate up to the model's context if the pool allows.

    The pool allows it if it holds all that the request holds at a time.
    """
    params = req.sampling_params
    asked, min_new_tokens = params.max_new_tokens, params.min_new_tokens
    try:
        get_runtime().read_settings(req)
    except ValueError as error:
        # The client gets it as status 400.
        req.set_finish_with_abort(str(error))
    limit(scheduler, req)
    config = get_runtime().settings_of(req)
    if config is None or req.to_finish is not None or req.finished():
        return
    input_len = len(req.origin_input_ids)
    # SGLang's own bound, with the context alone in the place of the smaller of context and pool.
    most = scheduler.model_config.context_len - 2 - input_len
    if asked is not None:
        most = min(most, asked)
    if scheduler.max_new_tokens_limit is not None and scheduler.max_new_tokens_limit > 0:
        most = min(most, scheduler.max_new_tokens_limit)
    if (
        most > params.max_new_tokens
        and can_ever_compact(config, most)
        and fits_pool(input_len, config.capacity, scheduler.max_total_num_tokens, scheduler.page_size)
    ):
        params.max_new_tokens = most
        params.min_new_tokens = min(min_new_tokens, most)


def end_if_too_long(enqueue: Callable[..., None], scheduler: Any, req: Any, is_retracted: bool = False) -> None:
    """End a retracted request that can neither be computed again nor restored, instead of letting it wait for ever."""
    config = get_runtime().settings_of(req)
    if config is not None and len(req.output_ids) > 0 and not req.finished() and host_copy_of(req) is None:
        history_len = len(req.origin_input_ids) + len(req.output_ids)
        if not can_be_admitted(req, history_len):
            _abort(scheduler, req, "no copy of its compressed KV could be kept")
            return
    enqueue(scheduler, req, is_retracted)


def drop_host_copies(scheduler: Any, why: str) -> None:
    """End all requests that wait to be restored: their KV no longer is what the model would compute.

    They wait for it because they are too long to be computed again.
    """
    dropped = [req for req in scheduler.waiting_queue if host_copy_of(req) is not None]
    if not dropped:
        return
    scheduler.waiting_queue = [req for req in scheduler.waiting_queue if host_copy_of(req) is None]
    for req in dropped:
        get_runtime().state_of(req).forget_cache()
        _abort(scheduler, req, why)


def drop_after_flush(is_flushed: bool, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Flush the copies on the host together with the cache."""
    if is_flushed:
        drop_host_copies(scheduler, "the cache was flushed before its compressed KV was put back")


def drop_before_weights(manager: Any, source: str) -> None:
    """Drop KV of the old weights."""
    scheduler = get_runtime().scheduler
    if scheduler is not None:
        drop_host_copies(scheduler, "the weights changed before its compressed KV was put back")


def _abort(scheduler: Any, req: Any, why: str) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT
    from sglang.srt.managers.scheduler import _make_abort_req

    history_len = len(req.origin_input_ids) + len(req.output_ids)
    message = (
        f"The request was preempted after {len(req.output_ids)} tokens, and its history of {history_len} tokens does "
        f"not fit the KV pool of {scheduler.max_total_num_tokens} tokens to be computed again, and {why}: send it "
        "again, and give the pool more memory (--mem-fraction-static) or do not preempt requests of this length."
    )
    req.to_finish = FINISH_ABORT(message, status_code=HTTPStatus.SERVICE_UNAVAILABLE)
    scheduler._release_aborted_request(req)
    scheduler.send_abort_output(_make_abort_req(req, finished_reason=req.to_finish.to_json()), req)
    get_runtime().stats.requests_aborted += 1


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
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class",
        kind="AFTER",
        function=use_exact_adder,
        signature="(self)",
        why="Admission would reserve room for every token a request may generate, and leave the freed room empty.",
        upstream="PrefillAdder asks the KV policy how much a request can still grow.",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        kind="AROUND",
        function=end_if_too_long,
        signature="(self, req, is_retracted=False)",
        why="A preempted request with a history longer than the pool would wait for ever to be prefilled again.",
        upstream="Retraction keeps a host copy of the compacted KV.",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.flush_cache",
        kind="AFTER",
        function=drop_after_flush,
        signature="(self, empty_cache=True)",
        why="Who flushes the cache, as after new weights, must not meet the old KV again in a restored request.",
        upstream="A `kv_policy.flush()` call in flush_cache.",
    ),
    Hook(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager._observe_weight_load"
        ),
        kind="BEFORE",
        function=drop_before_weights,
        signature="(self, source)",
        why="All ways to load new weights pass here; KV of the old ones must not come back in a restored request.",
        upstream="The same call before weights are loaded.",
    ),
)
