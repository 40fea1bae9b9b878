"""Named prefixes as requests arrive: what one asks of them is checked and done, or noted for its prefill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from rkv_sglang.config import BY_POLICY, BY_TASK, HEAD, PREFIX_FIELD, PolicyConfig
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.prefixes.asked import Asked, asked_of, refuse_other_repeat, refuse_sizes
from rkv_sglang.integration.runtime.prefixes.judging import DocumentAttention, Judging, LastQueries, Places
from rkv_sglang.integration.runtime.prefixes.named import (
    INFO_ATTRIBUTE,
    MADE_ATTRIBUTE,
    USED_ATTRIBUTE,
    Prefix,
    unsay,
    used_by,
)
from rkv_sglang.integration.runtime.prefixes.room import most_needed, refuse_without_score_room
from rkv_sglang.integration.runtime.prompts.slots import sides_of
from rkv_sglang.integration.runtime.requests import CONFIG_ATTRIBUTE, end_request
from rkv_sglang.messages import shown


def read_prefix(parts: Parts, req: Any, server: PolicyConfig) -> None:
    """Do what a request asks of named prefixes; call it once, behind ``Runtime.read_request``, before any limit is set.

    A request that goes on from one afterwards begins with tokens that stand for its slots.

    Raises:
        ValueError: It asks for what cannot be; one line.
    """
    asked = asked_of(req.sampling_params.custom_params)
    if asked is None:
        return
    for problem in _server_problems(parts, server):
        raise ValueError(problem)
    if asked.action == "list":
        info: Any = [prefix.info() for prefix in parts.prefixes.all_made()]
    elif asked.action == "delete":
        info = {"deleted": _delete(parts, asked.name).name}
    elif asked.action == "create":
        _reserve(parts, req, server, asked)
        # Its answer says more once it is made.
        return
    else:
        info = _use(parts, req, asked.name).info()
    setattr(req, INFO_ATTRIBUTE, info)


def drop_prefixes(parts: Parts) -> None:
    """Delete all named prefixes: their KV no longer is what the model would compute, or is gone."""
    # Not where the tree was emptied.
    is_held = parts.scheduler.tree_cache.protected_size() > 0
    for prefix in parts.prefixes.all():
        lock = prefix.lock
        parts.prefixes.forget(prefix)
        if is_held and lock is not None:
            parts.scheduler.tree_cache.unlock(lock)
        end_users_of(parts.scheduler, prefix)


def end_users_of(scheduler: Any, gone: Prefix) -> None:
    """End the requests that wait to go on from a prefix that is there no more; those that run hold it themselves."""
    waiting = [req for req in scheduler.waiting_queue if used_by(req) is gone]
    if waiting:
        scheduler.waiting_queue = [req for req in scheduler.waiting_queue if used_by(req) is not gone]
        for req in waiting:
            _end(scheduler, req, gone)


def end_without_prefix(parts: Parts, req: Any) -> bool:
    """End a request that is about to wait, if the prefix that it goes on from is there no more; return whether it was.

    Another that asks for log-probabilities within the prefix is refused here, where SGLang has read how many.
    """
    prefix = used_by(req)
    if prefix is None or req.finished() or req.to_finish is not None:
        return False
    if not parts.prefixes.has(prefix):
        _end(parts.scheduler, req, prefix)
        return True
    if req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids):
        unsay(req)
        req.set_finish_with_abort(
            f"{PREFIX_FIELD} {shown(prefix.name)} gives no log-probabilities of the prompt: leave logprob_start_len "
            "out, or set it to -1"
        )
    return False


def _end(scheduler: Any, req: Any, gone: Prefix) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    message = (
        f"{PREFIX_FIELD} {shown(gone.name)} was deleted while the request waited, or the cache was flushed or "
        "the weights changed: create it again and send the request again"
    )
    unsay(req)
    scheduler._release_aborted_request(req)
    end_request(scheduler, req, FINISH_ABORT(message, status_code=HTTPStatus.BAD_REQUEST, err_type="BadRequestError"))


def _server_problems(parts: Parts, server: PolicyConfig) -> Iterator[str]:
    """Yield one line for everything about this server for which it serves no named prefixes (yet)."""
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_parallel

    why = f"{PREFIX_FIELD} is not what this server can do:"
    parallel = get_parallel()
    if parts.scheduler.tree_cache.disable:
        yield f"{why} it has no radix cache; start it without --disable-radix-cache"
    if envs.SGLANG_RADIX_FORCE_MISS.get():
        yield f"{why} SGLANG_RADIX_FORCE_MISS keeps its radix cache from being used; start it without"
    if parallel.tp_size > 1 or parallel.dp_size > 1 or parallel.attn_tp_size > 1:
        yield f"{why} it has several ranks; start it with --tp-size 1 and --dp-size 1"
    if server.granularity != HEAD and not sides_of(parts.scheduler.token_to_kv_pool_allocator.get_kvcache())[1]:
        yield f"{why} its cache is of latent vectors (MLA), of which that has not been shown; leave {PREFIX_FIELD} out"
    if parts.attention_window > 0:
        yield (
            f"{why} some of the model's layers attend to the latest {parts.attention_window} tokens, which must stay; "
            f"leave {PREFIX_FIELD} out"
        )


def _request_problems(req: Any) -> Iterator[str]:
    """Yield one line for everything about a request with which it can neither make a prefix nor go on from one."""
    for name, is_there in (
        ("LoRA adapters", req.lora_id is not None),
        ("input_embeds", req.input_embeds is not None or req.positional_embed_overrides is not None),
        ("images", req.multimodal_inputs is not None),
        ("sessions", req.session is not None),
        ("beam searches", req.beam_group is not None),
    ):
        if is_there:
            yield f"{PREFIX_FIELD} does not go with {name}: leave one of them out"


def _reserve(parts: Parts, req: Any, server: PolicyConfig, asked: Asked) -> None:
    for problem in _request_problems(req):
        raise ValueError(problem)
    scheduler = parts.scheduler
    refuse_sizes(asked, len(req.origin_input_ids), server, scheduler.page_size)
    refuse_other_repeat(asked, req.origin_input_ids)
    if asked.judge != BY_POLICY and parts.scored is None:
        raise ValueError(
            f"{PREFIX_FIELD} judge {asked.judge!r} looks at keys, and this server's policy {server.policy!r} looks at "
            f"none: leave judge out, or start it with --kv-granularity {HEAD} or another policy"
        )
    if (other := parts.prefixes.find(asked.name)) is not None:
        state = "is there already" if other.is_made else "is being made"
        raise ValueError(
            f"{PREFIX_FIELD} {shown(asked.name)} {state}: take another name, or delete it first "
            f"({PREFIX_FIELD}: {{'delete': NAME}})"
        )
    kept = asked.num_kept(server)
    held = parts.prefixes.held_beside(req) + kept
    needed, whose = most_needed(parts, req)
    if held + needed > scheduler.max_total_num_tokens:
        raise ValueError(
            f"{PREFIX_FIELD} {shown(asked.name)} does not fit the KV pool of {scheduler.max_total_num_tokens} tokens: "
            f"with it named prefixes take {held}, and {whose} needs {needed}; set budget lower, delete others, or give "
            "the pool more memory (--mem-fraction-static)"
        )
    refuse_without_score_room(parts, asked)
    prefix = Prefix(
        name=asked.name,
        length=asked.length,
        budget=kept,
        ids=req.origin_input_ids[:kept],
        maker=req,
        window=server.window,
        block=None if server.granularity == HEAD else server.block,
        judge=asked.judge,
        judging=_judging(parts, req, server, asked),
    )
    setattr(req, MADE_ATTRIBUTE, prefix)
    parts.prefixes.reserve(prefix)


def _judging(parts: Parts, req: Any, server: PolicyConfig, asked: Asked) -> Judging:
    input_len = len(req.origin_input_ids)
    if parts.scored is None:
        return Places(input_len)
    first = asked.length if asked.judge == BY_TASK else input_len - asked.num_judging(server)
    if asked.judge == BY_POLICY:
        return LastQueries(first, input_len, parts.scored.buffers.keys.num_layers)
    req_to_token = parts.scheduler.req_to_token_pool.req_to_token
    return DocumentAttention(asked.judge, asked.length, first, input_len, parts.scored, req_to_token, req)


def _delete(parts: Parts, name: str) -> Prefix:
    prefix = _made(parts, name)
    parts.prefixes.forget(prefix)
    parts.scheduler.tree_cache.unlock(prefix.lock)
    end_users_of(parts.scheduler, prefix)
    return prefix


def _use(parts: Parts, req: Any, name: str) -> Prefix:
    prefix = _made(parts, name)
    for problem in _request_problems(req):
        raise ValueError(problem)
    if req.extra_key is not None or req.cache_salt is not None:
        raise ValueError(
            f"{PREFIX_FIELD} {shown(name)} is shared by all who name it, and does not go with extra_key or cache_salt: "
            "leave one of them out"
        )
    num_tokens, context_len = prefix.length + len(req.origin_input_ids), parts.scheduler.model_config.context_len
    # One token is generated, and Scheduler.init_req_max_new_tokens leaves two.
    if num_tokens + 3 > context_len:
        raise ValueError(
            f"{PREFIX_FIELD} {shown(name)} of {prefix.length} tokens and the {len(req.origin_input_ids)} that came are "
            f"more than the context of {context_len} tokens holds: send fewer"
        )
    req.origin_input_ids = prefix.ids + req.origin_input_ids
    req.extra_key = prefix.key
    setattr(req, USED_ATTRIBUTE, prefix)
    config: PolicyConfig | None = getattr(req, CONFIG_ATTRIBUTE)
    if config is not None:
        # What is left of the document is not chosen from again.
        setattr(req, CONFIG_ATTRIBUTE, replace(config, prompt_budget=0))
    return prefix


def _made(parts: Parts, name: str) -> Prefix:
    prefix = parts.prefixes.find(name)
    if prefix is None:
        raise ValueError(
            f"{PREFIX_FIELD} {shown(name)} is unknown here: create it first ({PREFIX_FIELD}: {{'create': NAME, "
            f"'length': TOKENS, 'budget': TOKENS}}), or leave {PREFIX_FIELD} out"
        )
    if not prefix.is_made:
        raise ValueError(f"{PREFIX_FIELD} {shown(name)} is being made: ask again once it is created")
    return prefix
