"""Compaction by the map alone: whole blocks leave the rows of an engine's index map, and no key or value is touched."""

import itertools
from collections.abc import Callable, Sequence

import torch

from rkv_sglang.cache.block_choice import BlockChoice
from rkv_sglang.kernels.transfer import sent, to_device
from rkv_sglang.kernels.warmup import NUM_REQUESTS
from rkv_sglang.sizes.compaction_plan import DropPlan


def drop_blocks(
    req_to_token: torch.Tensor,
    rows: Sequence[int],
    plans: Sequence[DropPlan],
    choices: Sequence[BlockChoice],
    page_size: int,
) -> torch.Tensor:
    """Take the dropped blocks out of some rows, and close the gaps. No sync: all sizes are known on the CPU.

    Mutates each row from the start of its first droppable block to ``plan.kept_len``; what comes later is stale then.

    Args:
        req_to_token: Slot of every token, ``[max_requests, max_len]``, int32, contiguous.
        rows: Of each request its row; distinct.
        plans, choices: Of each request; choices all on the map's device, or all on the CPU.
        page_size: Consecutive slots of a page, which a block consists of.

    Returns:
        Ids of the pages that became free, ``[sum of plan.evicted_tokens // page_size]``, int64.
    """
    device, width, block = req_to_token.device, req_to_token.shape[1], plans[0].block
    slots = req_to_token.view(-1)
    # Of every kept block, where its row starts and where it goes; of every dropped one, where its row starts; of every
    # token behind, where it is and where it goes. In the map, seen as one line.
    known: tuple[list[int], ...] = ([], [], [], [], [])
    kept_rows, targets, dropped_rows, tail, tail_targets = known
    for row, plan in zip(rows, plans, strict=True):
        start, first = row * width, row * width + plan.first_block * block
        kept_rows += [start] * plan.num_kept
        targets += range(first, first + plan.num_kept * block, block)
        dropped_rows += [start] * plan.num_dropped
        behind = range(start + plan.end_block * block, start + plan.resident_len)
        tail += behind
        tail_targets += range(behind.start - plan.evicted_tokens, behind.stop - plan.evicted_tokens)
    numbers = to_device([*itertools.chain(*known)], torch.int64, device)
    kept_start, target, dropped_start, tail_place, tail_target = torch.split(numbers, [len(part) for part in known])
    kept, dropped = (
        sent(torch.cat(parts), device)
        for parts in ([choice.kept for choice in choices], [choice.dropped for choice in choices])
    )
    offsets = torch.arange(block, device=device)
    places = ((kept_start + kept * block)[:, None] + offsets).flatten()
    stayed = slots[torch.cat([places, tail_place])]
    freed = slots[((dropped_start + dropped * block)[:, None] + offsets[::page_size]).flatten()]
    slots[torch.cat([(target[:, None] + offsets).flatten(), tail_target])] = stayed
    return freed.to(torch.int64) // page_size


def warm_up_drop(
    req_to_token: torch.Tensor,
    plan: DropPlan,
    choose: Callable[[Sequence[DropPlan]], Sequence[BlockChoice]],
    page_size: int,
) -> None:
    """Choose and drop blocks of made-up requests once, in a map of their own: a GPU loads code at its first use.

    Args:
        req_to_token: The map that will be rewritten; not touched.
        plan: Of each of these requests.
        choose: Chooses for some of them.
        page_size: As in ``drop_blocks``.
    """
    for num_requests in NUM_REQUESTS:
        plans = [plan] * num_requests
        rows = req_to_token.new_zeros(num_requests, plan.resident_len)
        drop_blocks(rows, range(num_requests), plans, choose(plans), page_size)
