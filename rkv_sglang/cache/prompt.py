"""Compaction of prompts: what every layer and KV head keeps of one is copied into slots of the request's own.

The slots that a prompt lies in may belong to everybody, so they are only read. All tokens of a prompt compete, as
generated ones do elsewhere; its first few and the last of a window stay whatever their score.
"""

from collections.abc import Callable, Sequence

import torch

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.selection import select_kept
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest, split_work
from rkv_sglang.config import NUM_FIRST_KEPT
from rkv_sglang.kernels.dispatch import runs_triton, score_paged
from rkv_sglang.kernels.move import move_kept_paged, move_kept_torch
from rkv_sglang.kernels.paged_batch import PagedBatch
from rkv_sglang.kernels.select import select_kept_paged
from rkv_sglang.policies import Policy
from rkv_sglang.sizes.compaction_plan import CompactionPlan
from rkv_sglang.sizes.prompt_plan import PromptPlan


def compact_prompts(
    buffers: KVBuffers,
    requests: Sequence[DueRequest[PromptPlan]],
    new_slots: Sequence[torch.Tensor],
    read_queries: Callable[[slice, slice], torch.Tensor],
    policy: Policy,
    window: int,
    *,
    query_bytes: int = 0,
    model: ModelAttention = PLAIN_ATTENTION,
) -> list[torch.Tensor | None]:
    """Copy of each request what its plan keeps of the prompt, and all that it generated, into new slots.

    Of a ``PrefixPlan`` what comes behind the document only judges it, and is not copied.

    Mutates the pool in ``new_slots`` alone. Queues no device-to-host sync if the policy has a paged scorer; working
    memory as in ``compact_requests``, but for one fp32 number more of each token, layer and head.

    Args:
        new_slots: Of each request ``[plan.kept_len]``, int64; distinct, and none of them any request's.
        read_queries, policy, window, query_bytes, model: As in ``compact_requests``.

    Returns:
        Of each request that ``wants_indices`` what was kept of its prompt, ascending,
        ``[num_layers, num_kv_heads, plan.budget]``, int64; None of the others.
    """
    results: list[torch.Tensor | None] = []
    scored: list[DueRequest[CompactionPlan]] = [
        DueRequest(due.plan.of_scores, due.slots, due.logical_len) for due in requests
    ]
    for part, batch, layers_of_part in split_work(buffers, scored, window, query_bytes):
        together, of_layers = requests[part], []
        for layers in layers_of_part:
            own, history = buffers.of_layers(layers), [due.history(layers) for due in together]
            scores = score_paged(own.keys, own.values, batch, read_queries(part, layers), policy, history, model)
            kept = choose_from_prompts(scores, [due.plan for due in together], window)
            copy_kept(own, together, new_slots[part], kept)
            of_layers.append(kept)
        for number, request in enumerate(together):
            chosen = [kept[number] for kept in of_layers] if request.wants_indices else None
            results.append(None if chosen is None else torch.cat(chosen))
    return results


def choose_from_prompts(scores: torch.Tensor, plans: Sequence[PromptPlan], window: int) -> list[torch.Tensor]:
    """Choose what every layer and head keeps of each prompt; no sync.

    Args:
        scores: Of all resident tokens, request after request, ``[num_layers, num_kv_heads, num_tokens]``, fp32.
        window: Last tokens of a prompt that stay, as the first ``NUM_FIRST_KEPT`` do.

    Returns:
        Of each prompt its tokens that stay, ascending, ``[num_layers, num_kv_heads, plan.budget]``, int64.
    """
    num_layers, num_kv_heads, _ = scores.shape
    of_prompts, start = [], 0
    for plan in plans:
        of_prompts.append(scores[:, :, start : start + plan.prompt_len])
        start += plan.resident_len
    first = torch.arange(NUM_FIRST_KEPT, device=scores.device).expand(num_layers, num_kv_heads, -1)
    choose = _best_paged if scores.is_cuda else _best_torch
    others = choose(of_prompts, plans, window)
    return [torch.cat([first, own + NUM_FIRST_KEPT], dim=2) for own in others]


def _best_paged(of_prompts: Sequence[torch.Tensor], plans: Sequence[PromptPlan], window: int) -> list[torch.Tensor]:
    """Choose of each prompt all but its first tokens, and count from behind these; one launch for all."""
    together = torch.cat(list(of_prompts), dim=2)
    batch = PagedBatch.from_slots(
        torch.zeros(together.shape[2], dtype=torch.int64, device=together.device),
        kv_lens=[plan.prompt_len for plan in plans],
        prompt_lens=[NUM_FIRST_KEPT] * len(plans),
        budgets=[plan.budget - NUM_FIRST_KEPT for plan in plans],
        window=window,
    )
    of_all = select_kept_paged(together, batch).long()
    return [of_all[:, i, :, : plan.budget - NUM_FIRST_KEPT] for i, plan in enumerate(plans)]


def _best_torch(of_prompts: Sequence[torch.Tensor], plans: Sequence[PromptPlan], window: int) -> list[torch.Tensor]:
    """Choose as ``_best_paged`` does."""
    return [
        torch.stack(
            [
                select_kept(layer[:, : plan.prompt_len - window], NUM_FIRST_KEPT, window, plan.budget - NUM_FIRST_KEPT)
                for layer in own
            ]
        )
        for own, plan in zip(of_prompts, plans, strict=True)
    ]


def copy_kept(
    buffers: KVBuffers,
    requests: Sequence[DueRequest[PromptPlan]],
    new_slots: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
) -> None:
    """Copy what is kept of each prompt, and what the plan keeps behind it, into new slots; no sync.

    To the kernels a request is its new slots with all that it holds behind them: what it keeps moves to the front.

    Args:
        buffers: Some layers of the pool.
        kept: As ``choose_from_prompts`` returns it, of those layers.
    """
    plans = [request.plan for request in requests]
    kept_lens = [plan.kept_len for plan in plans]
    slots = [part for request, new in zip(requests, new_slots, strict=True) for part in (new, request.slots)]
    batch = PagedBatch.from_slots(
        torch.cat(slots),
        kv_lens=[plan.kept_len + plan.resident_len for plan in plans],
        prompt_lens=[0] * len(plans),
        budgets=kept_lens,
        window=1,
    )
    num_layers, num_kv_heads, _ = kept[0].shape
    shape = (num_layers, len(plans), num_kv_heads, max(kept_lens))
    indices = torch.full(shape, -1, dtype=torch.int32, device=kept[0].device)
    for number, (plan, own) in enumerate(zip(plans, kept, strict=True)):
        row = indices[:, number]
        row[:, :, : plan.budget] = plan.kept_len + own
        row[:, :, plan.budget : plan.kept_len] = plan.kept_len + torch.arange(
            plan.prompt_len, plan.prompt_len + plan.kept_len - plan.budget, device=indices.device
        )
    move = move_kept_paged if runs_triton(buffers.keys) else move_kept_torch
    move(buffers.keys, buffers.values, batch, indices)


def copy_slots(layers: Sequence[torch.Tensor], slots: torch.Tensor, new_slots: torch.Tensor) -> None:
    """Copy what some slots hold into others, on the current stream; no sync.

    Mutates ``new_slots`` of the layers; holds no more than one layer's tokens at a time besides.

    Args:
        layers: First dimension the slot; keys, values, or whatever a token has.
        slots, new_slots: ``[num_tokens]``, int64; no slot is among both.
    """
    for layer in layers:
        layer.index_copy_(0, new_slots, layer.index_select(0, slots))
