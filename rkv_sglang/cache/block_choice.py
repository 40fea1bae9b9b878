"""The choice of the blocks that leave a request's row, one for all its layers and heads.

A block's score is the mean of its tokens' scores over tokens, layers and KV heads; the blocks of the lowest go, of
equal ones the older. A policy that looks at places alone is asked on the CPU, where nothing has to be waited for.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest, mark_filled, split_work
from rkv_sglang.kernels.dispatch import score_paged
from rkv_sglang.kernels.transfer import to_device
from rkv_sglang.policies import Places, Policy, is_stateful
from rkv_sglang.sizes.compaction_plan import DropPlan


@dataclass(frozen=True)
class BlockChoice:
    """Blocks of one request's row, by number, ascending.

    Attributes:
        kept: Of those that might have gone, those that stay, ``[plan.num_kept]``, int64.
        dropped: Those that go, ``[plan.num_dropped]``, int64.
        kept_state: What a stateful policy is to be given back at the request's next compaction, as
            ``DueRequest.kept_state``; None for other policies.
    """

    kept: torch.Tensor
    dropped: torch.Tensor
    kept_state: torch.Tensor | None = None


def kept_tokens(plan: DropPlan, choice: BlockChoice) -> torch.Tensor:
    """Return the generated tokens that stay, counted from the prompt's end as they are resident before, ascending.

    ``[plan.budget]``, int64, on the device of the choice.
    """
    device = choice.kept.device
    offsets = torch.arange(plan.block, device=device)
    parts = [
        torch.arange(plan.prompt_len, plan.first_block * plan.block, device=device),
        (choice.kept[:, None] * plan.block + offsets).flatten(),
        torch.arange(plan.end_block * plan.block, plan.resident_len, device=device),
    ]
    return torch.cat(parts) - plan.prompt_len


def choose_by_place(
    requests: Sequence[tuple[DropPlan, int, torch.Tensor | None]], policy: Policy, window: int
) -> list[BlockChoice]:
    """Choose for a policy that needs neither queries nor keys; all on the CPU.

    Args:
        requests: Of each its plan, the tokens ever seen of it, and the ``BlockChoice.kept_state`` of its last
            compaction.
        policy: One of which ``is_blind`` is true.
        window: Most recent tokens, kept whatever their score.
    """
    plans = [plan for plan, _, _ in requests]
    lens = torch.tensor([plan.generated_len - window for plan in plans])
    starts = [0, *lens.cumsum(0).tolist()]
    request = torch.arange(len(plans)).repeat_interleave(lens)
    indices, kv_lens, logical_lens = torch.tensor(
        [
            [plan.prompt_len - start, plan.resident_len, logical_len]
            for (plan, logical_len, _), start in zip(requests, starts, strict=False)
        ]
    )[request].T
    # Only the scores of these are asked for: of the generated tokens before the window.
    indices = indices + torch.arange(len(request))
    scores: torch.Tensor = policy.score_places(Places(indices, kv_lens, logical_lens))  # type: ignore[attr-defined]
    for (_, _, before), start in zip(requests, starts, strict=False):
        if before is not None:
            scores[start : start + len(before)] = before
    # In fp64, so that no two means become equal that are not.
    firsts = [start - plan.prompt_len for plan, start in zip(plans, starts, strict=False)]
    choices = _choose_lowest(scores.double(), plans, firsts)
    if not is_stateful(policy):
        return choices
    return [
        BlockChoice(own.kept, own.dropped, scores[start + kept_tokens(plan, own)[: plan.budget - window]])
        for plan, own, start in zip(plans, choices, starts, strict=False)
    ]


def choose_by_scores(
    buffers: KVBuffers,
    requests: Sequence[DueRequest[DropPlan]],
    read_queries: Callable[[slice, slice], torch.Tensor],
    policy: Policy,
    window: int,
    *,
    query_bytes: int = 0,
    model: ModelAttention = PLAIN_ATTENTION,
    sum_over_ranks: Callable[[torch.Tensor], None] | None = None,
) -> list[BlockChoice]:
    """Choose by what a policy makes of queries and keys; the pool is only read.

    Queues no device-to-host sync if the policy has a paged scorer. Working memory is bounded as that of
    ``compact_requests``, but for one fp32 number of each token, layer and head of requests taken together.

    Args:
        read_queries, policy, window, query_bytes, model: As in ``compact_requests``.
        sum_over_ranks: Adds up, in place, the sums over heads, ``[num_tokens]``, fp32, of ranks that have heads of
            their own each.
    """
    choices: list[BlockChoice] = []
    for part, batch, layers_of_part in split_work(buffers, requests, window, query_bytes):
        together = requests[part]
        plans = [due.plan for due in together]
        of_layers: list[torch.Tensor] = []
        totals = torch.zeros(batch.num_tokens, device=buffers.keys.device)
        for layers in layers_of_part:
            own, history = buffers.of_layers(layers), [due.history(layers) for due in together]
            scores = score_paged(own.keys, own.values, batch, read_queries(part, layers), policy, history, model)
            totals += scores.sum(dim=(0, 1))
            of_layers += [scores] if is_stateful(policy) else []
        mark_filled(together)
        if sum_over_ranks is not None:
            sum_over_ranks(totals)
        starts = [0, *itertools.accumulate(batch.kv_lens_cpu)]
        chosen = _choose_lowest(totals, plans, starts)
        if of_layers:
            chosen = _with_scores(chosen, plans, torch.cat(of_layers), starts, window)
        choices += chosen
    return choices


def _with_scores(
    chosen: Sequence[BlockChoice], plans: Sequence[DropPlan], scores: torch.Tensor, starts: Sequence[int], window: int
) -> list[BlockChoice]:
    """Add what the tokens kept for their score scored, ``[num_layers, num_kv_heads, budget - window]``."""
    return [
        BlockChoice(
            own.kept,
            own.dropped,
            scores.index_select(2, kept_tokens(plan, own)[: plan.budget - window] + (start + plan.prompt_len)),
        )
        for plan, own, start in zip(plans, chosen, starts, strict=False)
    ]


def _choose_lowest(scores: torch.Tensor, plans: Sequence[DropPlan], starts: Sequence[int]) -> list[BlockChoice]:
    """Choose blocks by the sums of their tokens' scores; a constant number of operations, and no sync.

    Args:
        scores: ``[num_tokens]``, floating; a NaN ranks above every number.
        starts: Of each request the column of its first token, were the prompt's there.
    """
    device, block = scores.device, plans[0].block
    width = max(plan.num_droppable for plan in plans)
    first_columns = [start + plan.first_block * plan.block for plan, start in zip(plans, starts, strict=False)]
    numbers = [first_columns, [plan.num_droppable for plan in plans], [plan.num_dropped for plan in plans]]
    first_column, num_droppable, num_dropped = to_device(
        [number for row in numbers for number in row], torch.int64, device
    ).view(3, len(plans), 1)
    blocks = torch.arange(width, device=device)
    is_outside = blocks >= num_droppable
    columns = (first_column + blocks * block).masked_fill(is_outside, 0)
    means = scores[columns[:, :, None] + torch.arange(block, device=device)].mean(dim=2)
    # Stable, so these come after all others, even after those that are infinite.
    means = means.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).masked_fill(is_outside, torch.inf)
    ranks = means.argsort(dim=1, stable=True).argsort(dim=1)
    group = (ranks < num_dropped).to(torch.int64) + 2 * is_outside
    # Of each request first what stays, then what goes, both ascending.
    lined_up = group.argsort(dim=1, stable=True)
    return [
        BlockChoice(row[: plan.num_kept] + plan.first_block, row[plan.num_kept : plan.num_droppable] + plan.first_block)
        for row, plan in zip(lined_up.unbind(), plans, strict=True)
    ]
