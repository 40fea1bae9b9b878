"""Which requests the scheduler takes in, and how long they may get: by what they hold, not by all they write."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from rkv_sglang.integration.hook import Hook
from rkv_sglang.integration.prefill_adder import adder_class
from rkv_sglang.integration.process import get_runtime
from rkv_sglang.integration.restore import can_be_admitted, host_copy_of
from rkv_sglang.sizes.lengths import can_ever_compact
from rkv_sglang.sizes.reservation import most_growth


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
        and config.capacity <= most_growth(input_len, scheduler.max_total_num_tokens)
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
