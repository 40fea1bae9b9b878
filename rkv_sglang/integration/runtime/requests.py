"""Requests: what one asks of the policy, in ``custom_params``, where it carries its state, and how one is ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rkv_sglang.config import MOST_TOKENS, NO_POLICY, NUM_FIRST_KEPT, POLICY_FIELD, PREFIX_FIELD, PolicyConfig
from rkv_sglang.integration.runtime.prefixes.named import gap_of
from rkv_sglang.messages import shown
from rkv_sglang.sizes.lengths import RequestState
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.stagger import head_start

BUDGET_FIELD, BUFFER_FIELD = "kv_budget", "kv_buffer"
PROMPT_FIELD, PROMPT_BUDGET_FIELD = "kv_prompt_len", "kv_prompt_budget"
TRACE_FIELD = "kv_trace"
FIELDS = (POLICY_FIELD, BUDGET_FIELD, BUFFER_FIELD, TRACE_FIELD, PROMPT_FIELD, PROMPT_BUDGET_FIELD, PREFIX_FIELD)
# Names that can only be meant for the policy: those that start so, and these. All others are somebody else's.
OWN_PREFIXES = ("kv_", "rkv_")
OWN_NAMES = ("kv", "rkv")

# A request carries these under these names; SGLang's Req is a plain class.
STATE_ATTRIBUTE = "rkv_state"
CONFIG_ATTRIBUTE = "rkv_config"
TRACE_ATTRIBUTE = "rkv_trace"
PROMPT_ATTRIBUTE = "rkv_prompt_len"
PROMPT_TRACE_ATTRIBUTE = "rkv_prompt_trace"
DOCUMENT_TRACE_ATTRIBUTE = "rkv_document_trace"


def known_state_of(req: Any) -> RequestState | None:
    """Return the state of a request; None if the policy has not looked at it yet."""
    state: RequestState | None = getattr(req, STATE_ATTRIBUTE, None)
    return state


def state_of(req: Any) -> RequestState:
    """Return the request's state, made at the first look, which is after SGLang has set its length limit."""
    state = known_state_of(req)
    if state is None:
        # Those that came back as prompt count as generated here.
        most = int(req.sampling_params.max_new_tokens) + num_carried_tokens(req)
        state = RequestState(prompt_len_of(req), most, prefix_gap=gap_of(req))
        setattr(req, STATE_ATTRIBUTE, state)
    return state


def prompt_len_of(req: Any) -> int:
    """Return how many tokens of the request are kept as its prompt: all it came with, unless it says otherwise."""
    return int(getattr(req, PROMPT_ATTRIBUTE, len(req.origin_input_ids)))


def num_carried_tokens(req: Any) -> int:
    """Return how many tokens of what a request came with are an earlier answer's, to be compacted as generated ones."""
    return len(req.origin_input_ids) - prompt_len_of(req)


def head_start_of(req: Any, config: PolicyConfig) -> int | None:
    """Return how early the request's next compaction comes, in tokens; None while its tokens have not decided it."""
    state = state_of(req)
    # After the first one since the last prefill, requests stay as far apart as that has put them.
    if not config.stagger or state.evicted_generated_tokens > 0:
        return 0
    if state.head_start is None:
        # As the tokens came to be, whichever of them came back as prompt.
        prompt, carried = req.origin_input_ids[: state.prompt_len], req.origin_input_ids[state.prompt_len :]
        state.head_start = head_start(config, prompt, [*carried, *req.output_ids])
    return state.head_start


def trace_of(req: Any) -> list[dict[str, Any]] | None:
    """Return the compactions of a request that asked for a trace, as ``pack_compaction`` makes them; else None."""
    return getattr(req, TRACE_ATTRIBUTE, None)


def prompt_trace_of(req: Any) -> dict[str, Any] | None:
    """Return what its prompt's last compaction kept, as ``pack_compaction`` makes it; None if nothing was recorded."""
    return getattr(req, PROMPT_TRACE_ATTRIBUTE, None)


def document_trace_of(req: Any) -> dict[str, Any] | None:
    """Return what the named prefix that it made kept of its document, as ``prompt_trace_of`` does of a prompt."""
    return getattr(req, DOCUMENT_TRACE_ATTRIBUTE, None)


def end_request(scheduler: Any, req: Any, reason: Any) -> None:
    """Send the last output of a request that ends while it waits, in the stream of outputs that all others end in.

    Its slots, if it had any, are freed already. Past that stream (``AbortReq``) it would lack the policy's fields and
    the tokens not sent yet, and the detokenizer would keep its text, and put it in front of the answer to the next
    request under the same id.

    Args:
        scheduler: SGLang's.
        req: The request; afterwards it is finished.
        reason: SGLang's ``FINISH_ABORT``; with an HTTP status of 400 or more, that is how an answer in one piece ends.
    """
    req.finished_reason, req.to_finish = reason, None
    scheduler.output_streamer.stream_output([req], req.return_logprob)


def _refuse_strange_fields(custom_params: Any) -> None:
    """Refuse what would pass for settings of the policy and be none."""
    if not isinstance(custom_params, Mapping):
        raise ValueError(
            f"custom_params must be a JSON object, such as {{{BUDGET_FIELD!r}: 2048}}, not a "
            f"{type(custom_params).__name__}: write it as an object or leave it out"
        )
    for name in custom_params:
        low = str(name).lower()
        if name not in FIELDS and (low.startswith(OWN_PREFIXES) or low in OWN_NAMES):
            raise ValueError(f"custom_params has no {shown(name)}: it takes {', '.join(FIELDS)}")


def config_for(
    custom_params: Any, server: PolicyConfig, pool_size: int, attention_window: int = 0
) -> PolicyConfig | None:
    """Return the settings of a request; None if it asks for no policy.

    Args:
        custom_params: Of the request's sampling parameters: a mapping, in which names of others are left alone, or
            None. ``kv_policy`` is ``"none"`` or the server's policy, the others but ``kv_trace`` are tokens.
        server: The server's settings, from which the rest comes.
        pool_size: Tokens of the KV pool.
        attention_window: Tokens that a layer attends to which attends to the latest alone, and which the budget must
            hold; 0 where none does, or where ``server.window`` holds them.

    Raises:
        ValueError: A value is bad; one line that names the field, the cause and the mend.
    """
    if custom_params is None:
        return server
    _refuse_strange_fields(custom_params)
    asked = {name: custom_params[name] for name in (BUDGET_FIELD, BUFFER_FIELD) if name in custom_params}
    policy = custom_params.get(POLICY_FIELD, server.policy)
    if policy not in (NO_POLICY, server.policy):
        raise ValueError(
            f"{POLICY_FIELD} {shown(policy)} is not what this server runs: leave it out, or set it to "
            f"{server.policy!r} or {NO_POLICY!r}"
        )
    if policy == NO_POLICY:
        others = [*asked, *[name for name in (PROMPT_FIELD, PROMPT_BUDGET_FIELD) if name in custom_params]]
        if others:
            raise ValueError(f"{POLICY_FIELD} {NO_POLICY!r} has no {' or '.join(others)}: leave one of them out")
        return None
    for name, value in asked.items():
        least = max(server.least_budget, attention_window) if name == BUDGET_FIELD else server.block
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            why = f" (the window of {server.window} is kept inside it)" if name == BUDGET_FIELD else ""
            if why and attention_window > server.least_budget:
                why = f" (some of the model's layers attend to the latest {attention_window} tokens)"
            raise ValueError(
                f"{name} {shown(value)} is not an integer of at least {least}{why}: set it to {least} or more"
            )
        if name == BUFFER_FIELD and value % server.block != 0:
            raise ValueError(
                f"{name} {shown(value)} is no multiple of the {server.block} tokens that this server drops together: "
                f"set it to {shown(ceil_to_page(value, server.block))}"
            )
    budget, buffer = asked.get(BUDGET_FIELD, server.budget), asked.get(BUFFER_FIELD, server.buffer)
    if asked and budget + buffer >= pool_size:
        raise ValueError(
            f"{BUDGET_FIELD} {shown(budget)} and {BUFFER_FIELD} {shown(buffer)} together exceed this server's KV pool "
            f"of {pool_size} tokens: set them lower"
        )
    prompt_budget = _prompt_budget_of(custom_params, server, attention_window)
    return replace(server, budget=budget, buffer=buffer, prompt_budget=prompt_budget)


def _prompt_budget_of(custom_params: Mapping[str, Any], server: PolicyConfig, attention_window: int) -> int:
    """Return what a request keeps of its prompt; 0: all. Raises ``ValueError``, one line, where that cannot be."""
    if PROMPT_BUDGET_FIELD not in custom_params:
        return server.prompt_budget
    value, least = custom_params[PROMPT_BUDGET_FIELD], server.least_prompt_budget
    if isinstance(value, bool) or not isinstance(value, int) or not (value == 0 or value >= least):
        raise ValueError(
            f"{PROMPT_BUDGET_FIELD} {shown(value)} is neither 0 nor an integer of at least {least} (the first "
            f"{NUM_FIRST_KEPT} and the last {server.window} tokens of a prompt always stay): set it to {least} or "
            "more, or to 0 to keep the prompt whole"
        )
    if value > MOST_TOKENS:
        raise ValueError(
            f"{PROMPT_BUDGET_FIELD} {shown(value)} is more than any context has: set it to {MOST_TOKENS} or less, or "
            "to 0 to keep the prompt whole"
        )
    if value > 0 and attention_window > 0:
        raise ValueError(
            f"{PROMPT_BUDGET_FIELD} {shown(value)} is not what this server can do: some of the model's layers attend "
            f"to the latest {attention_window} tokens, which must stay; leave {PROMPT_BUDGET_FIELD} out"
        )
    return value


def end_of_images(req: Any) -> int:
    """Return the place behind the last token of a request's images, and of whatever else is no text; 0 without any."""
    items = [] if req.multimodal_inputs is None else req.multimodal_inputs.mm_items
    return max((end + 1 for item in items for _, end in item.offsets or ()), default=0)


def marked_prompt_len(custom_params: Any, input_len: int, images_end: int = 0) -> int:
    """Return how many of a request's ``input_len`` tokens it marks as its prompt, with ``kv_prompt_len``; else all.

    Args:
        images_end: The place behind its last image. SGLang looks images up by their places, so all of them must stay.

    Raises:
        ValueError: It marks what cannot be; one line.
    """
    if not isinstance(custom_params, Mapping) or PROMPT_FIELD not in custom_params:
        return input_len
    value = custom_params[PROMPT_FIELD]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= input_len:
        raise ValueError(
            f"{PROMPT_FIELD} {shown(value)} is not an integer from 1 to the {input_len} tokens that came: set it to "
            "how many of them are the prompt, or leave it out"
        )
    if value < images_end:
        raise ValueError(
            f"{PROMPT_FIELD} {shown(value)} leaves an image behind the prompt, and images always stay: set it to "
            f"{images_end} or more, or leave it out"
        )
    return value


def wants_trace(custom_params: Any, server: PolicyConfig) -> bool:
    """Return whether a request asks that its compactions be recorded, with ``kv_trace``: true.

    Raises:
        ValueError: It asks for it and the server does not allow it, or the value is no boolean; one line.
    """
    if not isinstance(custom_params, Mapping) or TRACE_FIELD not in custom_params:
        return False
    value = custom_params[TRACE_FIELD]
    if not isinstance(value, bool):
        raise ValueError(f"{TRACE_FIELD} {shown(value)} is not a boolean: set it to true or leave it out")
    if value and not server.trace:
        raise ValueError(f"{TRACE_FIELD} is off on this server: start it with --kv-trace or leave {TRACE_FIELD} out")
    return value
