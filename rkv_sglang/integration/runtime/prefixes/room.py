"""Room in a pool of which named prefixes hold a part for as long as they are there."""

from __future__ import annotations

from typing import Any

from rkv_sglang.config import BY_POLICY, PREFIX_FIELD, PolicyConfig
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.prefixes.asked import Asked
from rkv_sglang.integration.runtime.prefixes.named import made_by, unsay
from rkv_sglang.integration.runtime.requests import CONFIG_ATTRIBUTE, known_state_of
from rkv_sglang.sizes.pages import ceil_to_page

# What attention is added up in may take, of all documents together that are being judged by it. It comes out of what
# SGLang leaves free for activations.
SCORE_BYTES = 256 * 2**20


def refuse_without_score_room(parts: Parts, asked: Asked) -> None:
    """Refuse a document whose tokens have scores of their own, where there is no room for them.

    Raises:
        ValueError: One line.
    """
    if asked.judge == BY_POLICY:
        return
    assert parts.scored is not None, "what every head keeps is chosen by scores"
    token_bytes = 4 * parts.scored.buffers.keys.num_layers * parts.scored.buffers.keys.num_kv_heads
    most, taken = SCORE_BYTES // token_bytes, parts.prefixes.num_judged
    if taken + asked.length > most:
        mend = f"set it to {most} or less, or judge by {BY_POLICY!r}"
        raise ValueError(
            f"{PREFIX_FIELD} length {asked.length} is more than there is room for: {asked.judge!r} adds up numbers for "
            f"{most} tokens at a time, and {taken} are being judged; "
            f"{mend if asked.length > most else 'ask again once they are'}"
        )


def slots_to_come(req: Any) -> int:
    """Return how many slots a request will take besides its own, for the prefix that it makes."""
    prefix = made_by(req)
    return 0 if prefix is None else prefix.budget


def most_needed(parts: Parts, maker: Any) -> tuple[int, str]:
    """Return how many slots the largest request needs that is here, and which that is.

    Once a prefix takes what it needs, it would wait for ever.
    """
    scheduler = parts.scheduler
    here = {id(req): req for req in (*scheduler.waiting_queue, *scheduler.running_batch.reqs, maker)}
    if scheduler.chunked_req is not None:
        here[id(scheduler.chunked_req)] = scheduler.chunked_req
    needed = {key: _needed(parts, req) for key, req in here.items()}
    largest = max(needed, key=lambda key: needed[key])
    return needed[largest], "this request" if largest == id(maker) else f"request {here[largest].rid}"


def limit_new_tokens(parts: Parts, req: Any) -> None:
    """Let a request generate no more than the pool holds beside it and all named prefixes, as SGLang does without."""
    held, params = parts.prefixes.held_beside(req), req.sampling_params
    if held > 0:
        most = max(_most_new(parts, len(req.origin_input_ids)) - held, 0)
        params.max_new_tokens = min(params.max_new_tokens, most)
        params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)


def refuse_without_room(parts: Parts, req: Any) -> None:
    """Refuse a new request that would wait for ever for what named prefixes hold."""
    held = parts.prefixes.held_beside(req)
    if held == 0 or len(req.output_ids) > 0 or req.finished() or req.to_finish is not None:
        return
    needed, pool_size = _needed(parts, req), parts.scheduler.max_total_num_tokens
    if needed + held > pool_size:
        unsay(req)
        req.set_finish_with_abort(
            f"The request needs {needed} tokens of the KV pool of {pool_size}, and named prefixes hold {held} of them: "
            f"send fewer tokens, ask for fewer, or delete a prefix ({PREFIX_FIELD}: {{'delete': NAME}})"
        )


def _needed(parts: Parts, req: Any) -> int:
    """Return how many slots a request holds at most."""
    page_size, params = int(parts.scheduler.page_size), req.sampling_params
    num_seen = len(req.origin_input_ids) + len(req.output_ids)
    left = int(parts.scheduler.max_total_num_tokens)
    if params.max_new_tokens is not None:
        left = max(params.max_new_tokens - len(req.output_ids), 0)
    config: PolicyConfig | None = getattr(req, CONFIG_ATTRIBUTE, None)
    if config is None:
        # As SGLang counts: a page more, and one token.
        return ceil_to_page(num_seen, page_size) + min(left, _most_new(parts, num_seen)) + page_size + 1
    most = num_seen + min(left, config.capacity)
    state = known_state_of(req)
    if state is not None and state.evicted_tokens > 0:
        # One that could not be computed again comes back with what it holds, and then waits for a window of queries.
        most = min(most, state.held_prompt_len + config.capacity + config.window)
    return ceil_to_page(most, page_size)


def _most_new(parts: Parts, num_seen: int) -> int:
    """Return what SGLang lets any request generate: what the pool holds beside it."""
    page_size, pool_size = int(parts.scheduler.page_size), int(parts.scheduler.max_total_num_tokens)
    return max(pool_size - ceil_to_page(num_seen, page_size) - page_size - 1, 0)
