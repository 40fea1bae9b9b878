"""Schedules in which preempted requests come back from a copy in host memory.

Copied is who was compacted and cannot be computed again: its history, with the window of queries that its next
compaction waits for, is more than the pool holds. SGLang takes by force the one with the fewest outputs, and never the
last one, so two must be as long as that; a pause takes all, and who has a higher priority those of a lower.
"""

import dataclasses
import random

from tests.fuzz.draw.servers import is_tight
from tests.fuzz.schedule import Event, FuzzRequest, Schedule
from tests.fuzz.server import ServerConfig

# Share of the schedules with tight pools that is made so: these take two or three times as long.
SHARE = 0.5
# Most outputs that it may take to outgrow the pool.
MOST_OUTPUTS = 230
# Requests of such a schedule, the long ones included.
MOST_REQUESTS = 4


def with_restores(rng: random.Random, schedule: Schedule) -> Schedule:
    """Return a schedule in which two requests outgrow the pool and are preempted then, where the server suits it."""
    server = schedule.server
    # Two of them run at once.
    most_prompt = server.pool // 2 // server.page_size * server.page_size - server.capacity
    outgrown = server.pool - server.window
    if not is_tight(server) or rng.random() >= SHARE or most_prompt < 1 or outgrown > MOST_OUTPUTS:
        return schedule
    # So many passes are those of others, and between the first and the last that is done to them.
    spare, spread = 6, server.buffer + 20
    length = outgrown + spare + spread + rng.randint(5, 20)
    first, second, *others = schedule.requests[:MOST_REQUESTS]
    requests = [_long(one, server, most_prompt, length) for one in (first, second)]
    start = outgrown + spare - len(requests[1].prompt)
    passes = sorted(start + rng.randint(0, spread) for _ in range(rng.choice([1, 2, 2, 3])))
    kind = rng.choice(["retract", "pause_retract", "newcomer" if server.priority else "retract"])
    events = [event for event in schedule.events if event.kind != "abort_all"]
    for at_pass in passes:
        if kind == "newcomer":
            newcomer = FuzzRequest(prompt=first.prompt, max_new_tokens=rng.randint(2, 12), at_pass=at_pass, priority=9)
            others.append(newcomer)
            continue
        events.append(Event(at_pass=at_pass, kind=kind))
        if kind == "pause_retract":
            paused = rng.randint(1, 5)
            if rng.random() < 0.1:
                events.append(Event(at_pass=at_pass + rng.randint(0, paused), kind="flush"))
            events.append(Event(at_pass=at_pass + paused, kind="continue"))
    if rng.random() < 0.1:
        # While it waits, or soon after.
        requests[1] = dataclasses.replace(requests[1], abort_at=passes[0] + rng.randint(1, 8))
    return dataclasses.replace(
        schedule,
        requests=(*requests, *others),
        events=tuple(sorted(events, key=lambda event: event.at_pass)),
    )


def _long(request: FuzzRequest, server: ServerConfig, most_prompt: int, max_new_tokens: int) -> FuzzRequest:
    """Return a request that runs on, with the server's settings and what of its own does not end it."""
    ends = request.needs_itself_alone or "stop_token_ids" in request.params
    return FuzzRequest(
        prompt=request.prompt[:most_prompt],
        max_new_tokens=max_new_tokens,
        priority=1 if server.priority else None,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        params={} if ends else request.params,
    )
