"""The making of a named prefix: what stays of a document is copied into slots that the radix tree gets.

It is made when the request that brings it is prefilled, before SGLang looks at the result: its slots are its own then,
whether it generates anything or not. The tokens behind the document are computed in any case; their queries, seen in
the forward pass, judge it. The request itself goes on as any other, and so does its prompt in the tree.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from rkv_sglang.cache.step_tensors import read_slots
from rkv_sglang.cache.trace import pack_compaction
from rkv_sglang.config import PREFIX_FIELD
from rkv_sglang.integration.runtime.jobs import on_forward_stream
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.prefixes.copying import keep_blocks, keep_heads
from rkv_sglang.integration.runtime.prefixes.named import INFO_ATTRIBUTE, MADE_ATTRIBUTE, Prefix, made_by
from rkv_sglang.integration.runtime.prompts.slots import alloc_slots
from rkv_sglang.integration.runtime.requests import DOCUMENT_TRACE_ATTRIBUTE, trace_of
from rkv_sglang.messages import shown
from rkv_sglang.policies import Policy
from rkv_sglang.sizes.prompt_plan import PrefixPlan


def see_tasks(parts: Parts, layer_id: int, queries: torch.Tensor, forward_batch: Any) -> None:
    """Take one layer's queries of a prefill for those prefixes that it judges; call it while some are in the making."""
    scored, start = parts.scored, 0
    if scored is None or not forward_batch.forward_mode.is_extend():
        return
    places = zip(
        forward_batch.rids or (),
        forward_batch.extend_seq_lens_cpu or (),
        forward_batch.extend_prefix_lens_cpu or (),
        strict=False,
    )
    for rid, num_tokens, first in places:
        prefix = parts.prefixes.in_making.get(rid)
        if prefix is not None and prefix.judging is not None:
            of_heads = (num_tokens, scored.layers[0].tp_q_head_num, scored.layers[0].qk_head_dim)
            own = queries[start : start + num_tokens].reshape(of_heads)
            prefix.judging.see(layer_id - scored.first_layer, own, first)
        start += num_tokens


def make_prefixes(parts: Parts, policy: Policy, batch: Any) -> None:
    """Make those prefixes whose requests this batch has prefilled; those that cannot be made end their requests."""
    if not batch.forward_mode.is_extend():
        return
    for req in batch.reqs:
        prefix = made_by(req)
        # A chunk of a prompt that is not its last is counted until its result was looked at.
        if prefix is None or prefix.is_made or req.inflight_middle_chunks > 0 or req.is_retracted:
            continue
        if req.finished() or req.to_finish is not None or not req.kv.holds_kv:
            continue
        try:
            _make(parts, policy, req, prefix)
        except ValueError as error:
            from sglang.srt.managers.schedule_batch import FINISH_ABORT

            parts.prefixes.forget(prefix)
            req.to_finish = FINISH_ABORT(str(error), status_code=400, err_type="BadRequestError")
        else:
            setattr(req, INFO_ATTRIBUTE, prefix.info())
        delattr(req, MADE_ATTRIBUTE)


def _make(parts: Parts, policy: Policy, req: Any, prefix: Prefix) -> None:
    """Copy what stays of the document, and give it to the radix tree.

    Raises:
        ValueError: The pool is full, or the task was not seen; one line.
    """
    scheduler = parts.scheduler
    judging = prefix.judging
    assert judging is not None, "it is in the making"
    with on_forward_stream(scheduler):
        judging.finish()
    if not judging.is_complete:
        raise ValueError(
            f"{PREFIX_FIELD} {shown(prefix.name)} cannot be made: the task's queries were not seen in all layers, as "
            "if prompts ran in a graph; start the server with prefill graphs off"
        )
    allocator: Any = scheduler.token_to_kv_pool_allocator
    if prefix.budget > allocator.available_size() + scheduler.tree_cache.evictable_size():
        raise ValueError(
            f"{PREFIX_FIELD} {shown(prefix.name)} cannot be made: the KV pool is full; delete a prefix, or try again "
            "when fewer requests run"
        )
    verdict = judging.verdict(policy, prefix.window)
    plan = PrefixPlan(prefix.length, verdict.resident_len, prefix.budget)
    new_slots = alloc_slots(scheduler, None, prefix.budget).clone()
    slots = read_slots(scheduler.req_to_token_pool.req_to_token, [req.kv.req_pool_idx], [plan.resident_len])[0]
    with on_forward_stream(scheduler) as stream, parts.timed():
        for tensor in (slots, new_slots) if stream is not None else ():
            if tensor.is_cuda:
                tensor.record_stream(stream)
        if parts.scored is not None:
            parts.scored.follow_scales()
        keep = keep_heads if prefix.block is None else partial(keep_blocks, block=prefix.block)
        wants_indices = trace_of(req) is not None
        kept = keep(parts, plan, verdict, slots, new_slots, prefix.window, wants_indices=wants_indices)
        if kept is not None:
            record = pack_compaction(kept.cpu(), resident_len=prefix.length, evicted_before=0)
            setattr(req, DOCUMENT_TRACE_ATTRIBUTE, record)
    parts.prefixes.made(prefix, req.rid, _put_into_tree(scheduler.tree_cache, prefix, new_slots))


def _put_into_tree(tree_cache: Any, prefix: Prefix, slots: Any) -> Any:
    """Give slots to the radix tree under the prefix's own key; return the lock that keeps them there."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    result = tree_cache.insert(InsertParams(key=RadixKey(prefix.ids, prefix.key), value=slots))
    return tree_cache.lock(result.last_device_node)
