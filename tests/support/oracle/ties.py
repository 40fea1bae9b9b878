"""Scores so close at the cut that another order of summation may choose the other: then either answer is right."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Scores of one and the same cache were seen to differ by 6e-7 between two orders of summation in fp32; small ones less.
CUT_TOLERANCE, RELATIVE_TOLERANCE = 1e-6, 1e-3
# Stands for a number of outputs where the choice is that of a named prefix.
AT_PREFIX = -1
# Near-ties of one answer that are tried the other way, each on its own.
MOST_TRIED = 6


def swapped_at_cut(scores: torch.Tensor, ranked: torch.Tensor, num_first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the last of the first ``num_first`` and the one after it change places where they are a near-tie.

    Both ``[num_kv_heads, num_candidates]``, in order of rank; all heads that have a near-tie at once. Scores that are
    equal are none: all choose by place.
    """
    gaps = (scores[:, num_first - 1] - scores[:, num_first]).abs()
    order = torch.arange(scores.shape[1]).repeat(len(scores), 1)
    is_close = (gaps < CUT_TOLERANCE) & (gaps < RELATIVE_TOLERANCE * scores[:, num_first].abs())
    order[(gaps > 0) & is_close, num_first - 1 : num_first + 1] = torch.tensor([num_first, num_first - 1])
    return scores.gather(1, order), ranked.gather(1, order)


def swapped_blocks(ranked: Sequence[int], scores: Mapping[int, float], num_gone: int) -> list[int]:
    """Return blocks in order of rank, the lowest first, with the two at the cut as ``swapped_at_cut`` leaves them."""
    if len(ranked) <= num_gone:
        return list(ranked)
    of_ranked = torch.tensor([[scores[block] for block in ranked]], dtype=torch.float64)
    swapped: list[int] = swapped_at_cut(of_ranked, torch.tensor([list(ranked)]), num_gone)[1][0].tolist()
    return swapped


def repeatable(make: Callable[P, R]) -> Callable[P, R]:
    """Let what a function returns, a dataclass, make itself again with other arguments by name: its ``again``."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        def again(**options: Any) -> R:
            return made(*args, **{**kwargs, **options})  # type: ignore[arg-type]

        return dataclasses.replace(make(*args, **kwargs), again=again)  # type: ignore[type-var]

    return made


def least_margin(margins: torch.Tensor) -> float:
    """Return the least of margins, of any shape, but for exact ties; 0 where there is nothing else."""
    margins = margins[margins != 0]
    return float(margins.min()) if len(margins) else 0.0


def settled(found: Sequence[int], expected: Any) -> Any:
    """Return ``expected`` with its near-ties at cuts decided as ``found`` decided them, as far as these explain it.

    Only cuts before the first token that differs are tried the other way, and one is taken only if more tokens are
    equal then, so nothing but a choice between two such tokens is forgiven.

    Args:
        expected: A ``DenseResult`` or ``MaskedResult``.
    """
    swapped: set[int] = set()
    for _ in range(MOST_TRIED):
        equal = num_equal(found, expected.output_ids)
        if equal == min(len(found), len(expected.output_ids)):
            break
        close = [at for at, margin in expected.cuts if at <= equal and 0 < margin < CUT_TOLERANCE and at not in swapped]
        for at in reversed(close[-MOST_TRIED:]):
            other = expected.again(swapped_at={*swapped, at}, guessed_output_ids=found)
            if num_equal(found, other.output_ids) > equal:
                swapped.add(at)
                expected = other
                break
        else:
            break
    return expected


def num_equal(found: Sequence[int], right: Sequence[int]) -> int:
    """Return how many leading tokens are equal."""
    pairs = zip(found, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(right)))
