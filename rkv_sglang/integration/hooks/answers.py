"""Hooks on answers: every one leaves by the same door, and its ``meta_info`` says how much its KV was compressed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rkv_sglang.config import NO_POLICY, POLICY_FIELD, PREFIX_FIELD
from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import MANAGERS, REQ, SCHEDULER
from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.prefixes.named import INFO_ATTRIBUTE
from rkv_sglang.integration.runtime.requests import (
    document_trace_of,
    end_request,
    known_state_of,
    prompt_len_of,
    prompt_trace_of,
    trace_of,
)
from rkv_sglang.sizes.lengths import RequestState

COMPACTIONS_KEY = "kv_compactions"
RESIDENT_KEY, EVICTED_KEY = "kv_resident_tokens", "kv_evicted_tokens"
PROMPT_KEY = "kv_prompt_tokens"
KEYS = (POLICY_FIELD, COMPACTIONS_KEY, RESIDENT_KEY, EVICTED_KEY, PROMPT_KEY)
# Only for requests that asked for it.
TRACE_KEY = "kv_trace"
OPTIONAL_KEYS = (TRACE_KEY, PREFIX_FIELD)
# What SGLang's tokenizer manager says of a request that was aborted without a reason while it waited.
WAS_WAITING = "Abort in waiting queue"


def answer_info(req: Any) -> dict[str, Any]:
    """Return what a finished request's ``meta_info`` gets.

    ``kv_resident_tokens`` are those held at the end, the last token not among them (its KV is never computed), and 0 of
    one that ended while it waited; ``kv_evicted_tokens`` are counted over the whole life, so a token evicted again
    after a retraction counts twice. ``kv_prompt_tokens`` are those that attention sees of the prompt.
    ``kv_trace`` is there if the request asked for it, and has ``prompt`` if that was compacted, and ``document`` if a
    named prefix was made of one; with tensor parallelism it knows the first rank's heads, and where all heads keep the
    same it has one row for all. ``kv_prefix`` is there if the request asked something of named prefixes, and it was
    done.
    """
    runtime = get_runtime()
    config = runtime.config_of(req)
    # Scheduler.handle_generate_request may refuse a request before it knows how many tokens that one may generate.
    state = known_state_of(req) or RequestState(prompt_len_of(req), max_new_tokens=0)
    info = {
        POLICY_FIELD: NO_POLICY if config is None else config.policy,
        COMPACTIONS_KEY: state.compactions,
        RESIDENT_KEY: _held_at_the_end(req, state),
        EVICTED_KEY: state.evicted_in_all,
        PROMPT_KEY: state.held_prompt_len,
    }
    trace = trace_of(req)
    if trace is not None:
        num_layers, num_kv_heads = runtime.trace_shape
        # That of an earlier prefill says nothing of a prompt that is whole again.
        extra = {"prompt": prompt_trace_of(req)} if state.evicted_prompt_tokens > 0 else {}
        if document_trace_of(req) is not None:
            extra["document"] = document_trace_of(req)
        info[TRACE_KEY] = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "compactions": trace, **extra}
    if hasattr(req, INFO_ATTRIBUTE):
        info[PREFIX_FIELD] = getattr(req, INFO_ATTRIBUTE)
    return info


def _held_at_the_end(req: Any, state: RequestState) -> int:
    # These count prefills and decode steps; a retraction sets them to 0.
    if req.extend_batch_idx == 0:
        return 0
    if req.decode_batch_idx == 0:
        return int(req.extend_end)
    return len(req.origin_input_ids) + len(req.output_ids) - 1 - state.evicted_tokens


@functools.cache
def streamer_class(base: Any) -> Any:
    """Return SGLang's ``SchedulerOutputStreamer`` with the policy's fields on the last output of every request."""

    class PolicyOutputStreamer(base):  # type: ignore[misc]
        """Sends along what the policy did."""

        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[list[Any]]]:
            from sglang.srt.managers.utils import is_health_check_generate_req

            if not any(req.finished() for req in reqs):
                return {}
            infos = [answer_info(req) if req.finished() else {} for req in reqs]
            for req in reqs:
                if req.finished() and (state := known_state_of(req)) is not None:
                    state.drop_tensors()
                    # Nobody asked for those, and an idle server has thousands.
                    if not is_health_check_generate_req(req):
                        get_runtime().stats.count_answer(state)
            return {key: [[info[key]] if key in info else [] for info in infos] for key in (*KEYS, *OPTIONAL_KEYS)}

    return PolicyOutputStreamer


def use_policy_streamer(result: Any, scheduler: Any) -> Any:
    """Have the scheduler send the policy's fields with its last output of a request."""
    return streamer_class(result)


def end_as_others(_: Callable[..., None], scheduler: Any, abort_req: Any, req: Any) -> None:
    """Send, as a request's last output, what SGLang would report of its end past the stream of outputs."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    told = abort_req.finished_reason
    if told is None and req.finished():
        reason = req.finished_reason
    else:
        told = told or {"message": WAS_WAITING}
        reason = FINISH_ABORT(told["message"], told.get("status_code"), told.get("err_type"))
    end_request(scheduler, req, reason)


def unpack_answer_info(_: None, manager: Any, meta_info: dict[str, Any], state: Any, *args: Any, **kwargs: Any) -> None:
    """Make the policy's fields plain values: SGLang gathers what comes along in lists, one entry a token."""
    for key in (*KEYS, *OPTIONAL_KEYS):
        values = state.customized_info_accumulated.pop(key, [])
        state.customized_info_reported_keys.discard(key)
        if values:
            meta_info[key] = values[-1]
        else:
            meta_info.pop(key, None)


STREAMER_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class",
        kind="AFTER",
        function=use_policy_streamer,
        signature="(self)",
        why="Training on answers needs to know of each whether its cache was compressed.",
        upstream="The KV policy adds to the outputs of a request.",
        uses=(
            *names(
                "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer",
                "build_additional_customized_info has_additional_customized_info",
            ),
            *names(REQ, "decode_batch_idx extend_batch_idx extend_end finished origin_input_ids output_ids"),
            f"{MANAGERS}.utils.is_health_check_generate_req",
        ),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.send_abort_output",
        kind="AROUND",
        function=end_as_others,
        signature="(self, abort_req, req)",
        why=(
            "What ends while it waits is reported past the detokenizer, which keeps its text for the next request of "
            "that id, and without the policy's fields."
        ),
        upstream="The scheduler ends every request through its output streamer.",
        uses=(
            f"{SCHEDULER}.output_streamer",
            "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
            f"{MANAGERS}.io_struct.AbortReq.finished_reason",
            f"{MANAGERS}.schedule_batch.FINISH_ABORT",
            *names(REQ, "finished finished_reason return_logprob to_finish"),
        ),
    ),
)

META_INFO_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        kind="AFTER",
        function=unpack_answer_info,
        signature="(self, meta_info, state, customized_info, index, finish_reason)",
        why="The policy's fields would arrive as lists of one value.",
        upstream="Fields of a request that are no list of one value a token.",
        uses=(
            *names(
                "sglang.srt.managers.tokenizer_manager.ReqState",
                "customized_info_accumulated customized_info_reported_keys",
            ),
        ),
        surroundings=names(
            "sglang.srt.managers.tokenizer_manager.TokenizerManager",
            "_accumulate_request_meta_info _handle_batch_output",
        ),
    ),
)
