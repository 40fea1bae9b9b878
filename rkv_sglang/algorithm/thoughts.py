"""Thoughts of a reasoning model (ThinKV, arXiv 2510.01290): what kind a stretch of text is, and how much of it stays.

A request's candidates are cut into segments, and a table has a column for each, the oldest first. All layers and KV
heads keep as many tokens of a segment, so there is one table for all of them. Its numbers are on the device and its
shape is known without them: nothing here waits.
"""

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.algorithm.validation import check_keys, check_queries

# Kinds of segments, and their order in which they shrink: what matters least goes first.
EXECUTION, REASONING, TRANSITION = 0, 1, 2
SHRINKS_AS = (1, 2, 0)
LEAST_KEPT = 4
# Bounds of a sparsity between which every number lies, so that all is reasoning.
ONE_KIND = (-1.0, 2.0)
# Rows of a table, ``[5, num_segments]``, int64: the kind of each segment; how often it shrank; its candidates that are
# held; how many of them its level allows; how many stay once the budget is filled up.
KIND, LEVEL, HELD, AIM, KEPT = range(5)


def sparsities(queries: Tensor, keys: Tensor, negligible: float, model: ModelAttention) -> Tensor:
    """Return the share of tokens that get next to no attention in one layer, of each of the last steps.

    Of a step: the largest logit of each query group, its softmax over all tokens up to the step, the mean over KV
    heads; the share of these that are below ``negligible`` times the largest.

    Args:
        queries: Post-RoPE queries of the last ``window`` tokens, ``[window, num_qo_heads, head_dim]``, floating.
        keys: As cached, ``[L, num_kv_heads, head_dim]``, floating.
        negligible: In [0, 1].

    Returns:
        Numbers in [0, 1], ``[window]``, fp32.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    check_keys(keys)
    check_queries(queries, keys)
    num_tokens, num_kv_heads, head_dim = keys.shape
    window = len(queries)
    # [num_kv_heads, gqa_group_size * window, head_dim]: one product for a group, so its keys are not copied for each.
    grouped = queries.float().reshape(window, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
    products = (grouped @ keys.float().permute(1, 2, 0)).view(num_kv_heads, -1, window, num_tokens)
    logits = model.logits(products, head_dim).amax(dim=1)
    last_seen = torch.arange(num_tokens - window, num_tokens, device=keys.device)[:, None]
    is_later = torch.arange(num_tokens, device=keys.device) > last_seen
    # [window, L]
    attention = logits.masked_fill(is_later, -torch.inf).softmax(dim=2).mean(dim=0)
    is_negligible = (attention < negligible * attention.amax(dim=1, keepdim=True)) & ~is_later
    return is_negligible.sum(dim=1) / (last_seen[:, 0] + 1)


def kind_of(sparse: Tensor, execution_up_to: float, transition_above: float) -> Tensor:
    """Return the kind of a stretch by its sparsity, ``[]``, int64."""
    return torch.where(
        sparse > transition_above, TRANSITION, torch.where(sparse <= execution_up_to, EXECUTION, REASONING)
    )


def sizes_of_levels(segment: int) -> list[int]:
    """Return how many tokens of a segment each level allows: all, half of them, a quarter, ... down to 4.

    With segments of 128 tokens these are the published 128, 64, 32, 16, 8, 4.
    """
    sizes = [segment]
    while sizes[-1] > LEAST_KEPT:
        sizes.append(max(sizes[-1] // 2, LEAST_KEPT))
    return sizes


def next_table(before: Tensor | None, kind: Tensor, num_candidates: int, room: int, segment: int) -> Tensor:
    """Return the table of a compaction, from that of the one before.

    Tokens that came since are new segments, cut from the newest backwards. The newest has the kind that was measured;
    others that are new count as reasoning: nobody looked at them. A transition makes every earlier segment a level
    smaller. While they are too many, the oldest segment of the kind that matters least becomes a level smaller; where
    all are at 4, whole segments go in the same order. Then the newest tokens of those left out fill up what is missing.

    Args:
        before: The table of the last compaction, which kept ``room`` candidates; None at the first.
        kind: Of the newest segment, ``[]``, int64, on the device of the table.
        num_candidates: Candidates now.
        room: How many of them stay; no more.
        segment: Length of a segment.

    Raises:
        ValueError: Fewer candidates are there than stay.
    """
    if not 0 <= room <= num_candidates:
        raise ValueError(f"{room} of {num_candidates} candidates cannot stay")
    table = _grown(before, kind, num_candidates, room, segment)
    sizes = sizes_of_levels(segment)
    last_level = len(sizes) - 1
    is_earlier = torch.arange(table.shape[1], device=table.device) < table.shape[1] - 1
    level = table[LEVEL] + (is_earlier & (kind == TRANSITION))
    level = level.clamp(max=last_level)
    held = table[HELD]
    # [num_segments, num_levels]: what a segment has at each level, and by how much it shrinks from there to the next.
    at_level = torch.stack([held.clamp(max=size) for size in sizes], dim=1)
    levels = torch.arange(last_level, device=table.device)
    is_possible = levels >= level[:, None]
    saved = (at_level[:, :-1] - at_level[:, 1:]) * is_possible
    order = _shrinking_order(table[KIND])
    total = at_level.gather(1, level[:, None]).sum()
    saved_before = saved[order].flatten().cumsum(0).view_as(saved) - saved[order]
    shrinks = is_possible[order] & (total - saved_before > room)
    level = level.scatter_add(0, order, shrinks.sum(dim=1))
    aim = at_level.gather(1, level[:, None])[:, 0]
    gone_before = aim[order].cumsum(0) - aim[order]
    goes = torch.zeros_like(aim, dtype=torch.bool).scatter(0, order, aim.sum() - gone_before > room)
    aim = aim.masked_fill(goes, 0)
    spare = held - aim
    # What newer segments have to spare.
    newer = spare.flip(0).cumsum(0).flip(0) - spare
    filled = torch.minimum((room - aim.sum() - newer).clamp(min=0), spare)
    return torch.stack([table[KIND], level, held, aim, aim + filled])


def _grown(before: Tensor | None, kind: Tensor, num_candidates: int, room: int, segment: int) -> Tensor:
    """Return kinds, levels and held tokens of what the last compaction kept, and of new segments behind it."""
    num_new = num_candidates - (0 if before is None else room)
    count = max(1, -(-num_new // segment))
    held = torch.full((count,), segment, device=kind.device)
    held[:1] = num_new - (count - 1) * segment
    kinds = torch.full_like(held, REASONING)
    kinds[-1:] = kind
    new = torch.stack([kinds, torch.zeros_like(held), held])
    if before is None:
        return new
    old = torch.stack([before[KIND], before[LEVEL], before[KEPT]])
    # Of the segments of which something is left there are no more than tokens; they keep their order.
    alive = (old[HELD] == 0).long().argsort(stable=True)[:room]
    return torch.cat([old[:, alive], new], dim=1)


def _shrinking_order(kinds: Tensor) -> Tensor:
    """Return the segments, those that shrink first in front: by kind, and by age."""
    ranks = torch.full_like(kinds, SHRINKS_AS[EXECUTION])
    for kind in (REASONING, TRANSITION):
        ranks = ranks.masked_fill(kinds == kind, SHRINKS_AS[kind])
    return ranks.argsort(stable=True)
