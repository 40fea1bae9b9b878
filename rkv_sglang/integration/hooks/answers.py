"""Hooks on answers: their ``meta_info`` says whether, and how much, their KV was compressed."""

from __future__ import annotations

import functools
from typing import Any

from rkv_sglang.config import NO_POLICY, POLICY_FIELD
from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import REQ
from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.requests import known_state_of, trace_of
from rkv_sglang.sizes.lengths import RequestState

COMPACTIONS_KEY = "kv_compactions"
RESIDENT_KEY, EVICTED_KEY = "kv_resident_tokens", "kv_evicted_tokens"
KEYS = (POLICY_FIELD, COMPACTIONS_KEY, RESIDENT_KEY, EVICTED_KEY)
# Only for requests that asked for it.
TRACE_KEY = "kv_trace"


def answer_info(req: Any) -> dict[str, Any]:
    """Return what a finished request's ``meta_info`` gets.

    ``kv_resident_tokens`` are those held at the end, the last token not among them (its KV is never computed);
    ``kv_evicted_tokens`` are counted over the whole life, so a token evicted again after a retraction counts twice.
    ``kv_trace`` is there if the request asked for it; with tensor parallelism it knows the first rank's heads.
    """
    runtime = get_runtime()
    config = runtime.config_of(req)
    # Scheduler.handle_generate_request may refuse a request before it knows how many tokens that one may generate.
    state = known_state_of(req) or RequestState(len(req.origin_input_ids), max_new_tokens=0)
    seen = len(req.origin_input_ids) + max(len(req.output_ids) - 1, 0)
    info = {
        POLICY_FIELD: NO_POLICY if config is None else config.policy,
        COMPACTIONS_KEY: state.compactions,
        RESIDENT_KEY: seen - state.evicted_tokens,
        EVICTED_KEY: state.evicted_in_all,
    }
    trace = trace_of(req)
    if trace is not None:
        keys = runtime.parts.buffers.keys
        info[TRACE_KEY] = {"num_layers": keys.num_layers, "num_kv_heads": keys.num_kv_heads, "compactions": trace}
    return info


@functools.cache
def streamer_class(base: Any) -> Any:
    """Return SGLang's ``SchedulerOutputStreamer`` with the policy's fields on the last output of every request."""

    class PolicyOutputStreamer(base):  # type: ignore[misc]
        """Sends along what the policy did."""

        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[list[Any]]]:
            if not any(req.finished() for req in reqs):
                return {}
            infos = [answer_info(req) if req.finished() else {} for req in reqs]
            for req in reqs:
                if req.finished() and (state := known_state_of(req)) is not None:
                    state.drop_tensors()
            return {key: [[info[key]] if key in info else [] for info in infos] for key in (*KEYS, TRACE_KEY)}

    return PolicyOutputStreamer


def use_policy_streamer(result: Any, scheduler: Any) -> Any:
    """Have the scheduler send the policy's fields with its last output of a request."""
    return streamer_class(result)


def unpack_answer_info(_: None, manager: Any, meta_info: dict[str, Any], state: Any, *args: Any, **kwargs: Any) -> None:
    """Make the policy's fields plain values: SGLang gathers what comes along in lists, one entry a token."""
    for key in (*KEYS, TRACE_KEY):
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
            *names(REQ, "finished origin_input_ids output_ids"),
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
