"""Make a failing schedule smaller: leave out whatever it fails without, greedily."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from tests.fuzz.campaign import run_and_check
from tests.fuzz.schedule import Schedule

# Smaller schedules tried side by side in one scheduler process.
AT_ONCE = 24
# Rounds of them; each makes the schedule smaller or is the last.
MOST_ROUNDS = 16


def shrink(
    schedule: Schedule,
    fail: Callable[[Sequence[Schedule]], list[bool]],
    tell: Callable[[str], None] = print,
) -> Schedule:
    """Return a schedule of the same server that fails too, and of which no part could be left out.

    Args:
        schedule: Fails; if it does not, because it did so only after others, it is returned as it is.
        fail: Tells of each schedule whether it fails; ``do_fail`` runs them.
    """
    for number in range(MOST_ROUNDS):
        candidates = list(smaller(schedule))[:AT_ONCE]
        failing = [one for one, failed in zip(candidates, fail(candidates), strict=True) if failed]
        if not failing:
            break
        schedule = min(failing, key=size)
        tell(f"smaller, round {number}: {len(schedule.requests)} requests, {len(schedule.events)} events")
    return schedule


def do_fail(schedules: Sequence[Schedule]) -> list[bool]:
    """Run schedules of one server and return which of them fail."""
    return [bool(outcome.verdict.problems) for outcome in run_and_check(schedules)]


def size(schedule: Schedule) -> tuple[int, int, int]:
    """Order schedules: requests and events first, then tokens, then settings of requests."""
    requests = schedule.requests
    tokens = sum(len(request.prompt) + request.max_new_tokens + request.at_pass for request in requests)
    special = sum(
        bool(request.params)
        + (request.abort_at is not None)
        + request.logprobs
        + request.asks("use")
        + (request.marked is not None)
        + (request.picture is not None)
        for request in requests
    )
    return len(requests) + len(schedule.events), tokens, special


def smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Yield schedules that have a part less, those with the largest part less first."""
    count = len(schedule.requests)
    if count > 3:
        for half in (range(count // 2), range(count // 2, count)):
            less = schedule
            for index in reversed(half):
                if index < len(less.requests):
                    less = less.without_request(index)
            yield less
    for index in reversed(range(count)):
        if count > 1:
            yield schedule.without_request(index)
    if len(schedule.events) > 1:
        yield dataclasses.replace(schedule, events=())
    for index in range(len(schedule.events)):
        yield schedule.without_event(index)
    for index, request in enumerate(schedule.requests):
        # A document is a part of its own length, and an image stands in its place.
        is_of_a_piece = request.asks("create") or request.picture is not None
        plain = (
            {"params": {}},
            {"logprobs": False},
            {"marked": None},
            {"picture": None},
            {"abort_at": None, "abort_after": None},
            {"at_pass": 0},
            {"max_new_tokens": max(request.max_new_tokens // 2, 1)},
            {"max_new_tokens": max(request.max_new_tokens - 1, 1)},
            {"prefix": None if request.asks("use") else request.prefix},
            {} if is_of_a_piece else {"prompt": request.prompt[: max(len(request.prompt) // 2, 1)]},
        )
        for change in plain:
            less_of_it = dataclasses.replace(request, **change)  # type: ignore[arg-type]
            if less_of_it != request:
                requests = [*schedule.requests[:index], less_of_it, *schedule.requests[index + 1 :]]
                yield dataclasses.replace(schedule, requests=tuple(requests))
