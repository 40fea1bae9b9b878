"""Named prefixes: requests that make them, go on from them, list and delete them, at good times and at bad ones.

Drawn apart, so that other seeds stay what they were.
"""

import random
from dataclasses import replace

from devtools.tiny_models import VOCAB_SIZE
from rkv_sglang.config import BY_POLICY, BY_REPEAT, BY_TASK, JUDGES, NUM_FIRST_KEPT, REQUEST
from rkv_sglang.policies import POLICIES, is_blind
from rkv_sglang.sizes.pages import ceil_to_page
from tests.fuzz.draw.servers import is_tight, most_prompt
from tests.fuzz.schedule import Event, FuzzRequest, Schedule
from tests.fuzz.server import ServerConfig

# Share of the schedules whose server can make prefixes; a quarter of all servers can.
SHARE = 0.65
NAMES = ("a", "b")
# Of document and task.
MOST_TOKENS = 90


def with_prefixes(seed: int, schedule: Schedule) -> Schedule:
    """Return a schedule in which requests make prefixes and others use and delete them, where the server suits it."""
    rng, server = random.Random(f"prefixes {seed}"), schedule.server
    least_spare = server.block or 1
    if not server.serves_prefixes or rng.random() >= SHARE or _most_tokens(server, _least_budget(server)) < least_spare:
        return schedule
    names = NAMES[: 2 if rng.random() < 0.4 and not is_tight(server) else 1]
    makers = [_maker(rng, server, name, set()) for name in names]
    # Two of one name, of which one finds it taken.
    if rng.random() < 0.15 and not is_tight(server) and server.block is None:
        makers.append(replace(_maker(rng, server, "a", {_sizes(makers[0])}), at_pass=rng.choice([0, 0, 1, 2, 9])))
    requests = _requests(rng, schedule, makers)
    requests += _deletions(rng, server, requests, makers)
    judges = random.Random(f"judges {seed}")
    requests = [_judged(judges, server, one) if one.asks("create") else one for one in requests]
    if rng.random() < 0.25:
        requests.append(_asking(rng, server, {"list": True}, at_pass=rng.randrange(0, 60)))
    if rng.random() < 0.1:
        requests.append(_user(rng, server, "nobody", at_pass=rng.randrange(0, 40)))
    return replace(schedule, requests=tuple(requests), events=_events(rng, schedule.events))


def _least_budget(server: ServerConfig) -> int:
    chosen = NUM_FIRST_KEPT + 1 if server.block is None else 2 * server.block
    return ceil_to_page(server.window + chosen, server.page_size)


def _most_tokens(server: ServerConfig, budget: int) -> int:
    """Return the most tokens of document and task beyond the least, so that the pool has room for what is asked."""
    beside = budget + server.capacity + 2 * server.page_size + 2
    return min(server.pool - beside, MOST_TOKENS) - (budget + 1 + server.window)


def _maker(rng: random.Random, server: ServerConfig, name: str, taken: set[tuple[int, int]]) -> FuzzRequest:
    """Return a request that makes a prefix, of other sizes than those ``taken``: answers then tell which it was."""
    page, chunk = server.page_size, server.chunk_size or 16
    budget = _least_budget(server)
    wider = budget + page * rng.choice([0, 0, 1, 2, 11 if page == 1 else 1])
    if server.block is not None:
        # Whole blocks go, and it has few sizes.
        spare = _most_tokens(server, budget)
        length = budget + server.block * rng.randint(1, (spare + 1) // server.block)
        return _making(rng, server, name, length, budget, spare)
    if not is_tight(server) or (_most_tokens(server, wider) > 4 and wider <= server.window + 14):
        budget = wider
    spare = _most_tokens(server, budget)
    least = budget + 1
    edges = [least, 2 * page, 2 * page + 1, 3 * page - 1, chunk - 1, chunk, chunk + 1, 2 * chunk + 1]
    lengths = [length for length in edges if least <= length <= least + spare]
    length = rng.choice([*lengths, *(least + rng.randint(0, spare) for _ in range(4))])
    while (length, budget) in taken:
        length = least + (length - least + 1) % (spare + 1)
    return _making(rng, server, name, length, budget, spare)


def _making(rng: random.Random, server: ServerConfig, name: str, length: int, budget: int, spare: int) -> FuzzRequest:
    """Return a request that makes a prefix of these sizes, with a task behind the document."""
    page, chunk = server.page_size, server.chunk_size or 16
    left = spare - (length - budget - 1)
    tasks = [n for n in (0, 1, page, chunk - server.window, chunk - server.window + 1) if 0 <= n <= left]
    task_len = server.window + rng.choice([*tasks, rng.randint(0, left)])
    return _asking(
        rng,
        server,
        {"create": name, "length": length, "budget": budget},
        prompt_len=length + task_len,
        max_new_tokens=rng.choice([1, 1, 2, server.window + 2, server.capacity + 2, 30]),
        at_pass=rng.choice([0, 0, 0, rng.randrange(0, 30)]),
        abort_at=rng.randrange(0, 20) if rng.random() < 0.06 else None,
    )


def _judged(rng: random.Random, server: ServerConfig, maker: FuzzRequest) -> FuzzRequest:
    """Return a request that makes a prefix with a judge drawn, and behind its document what that one wants."""
    length, judge = maker.prefix["length"], rng.choice((BY_POLICY, *JUDGES))
    if server.granularity == REQUEST and is_blind(POLICIES[server.policy]):
        # It looks at no keys.
        return maker
    document, behind = maker.prompt[:length], maker.prompt[length:]
    if judge == BY_TASK:
        behind = behind[: rng.choice([1, 2, len(behind), len(behind)])]
    elif judge == BY_REPEAT:
        behind = (*behind[: rng.randint(1, 6)], *document)
        budget = maker.prefix["budget"]
        if length + len(behind) > budget + 1 + server.window + _most_tokens(server, budget):
            return maker
    return replace(maker, prompt=(*document, *behind), prefix={**maker.prefix, "judge": judge})


def _sizes(maker: FuzzRequest) -> tuple[int, int]:
    return maker.prefix["length"], maker.prefix["budget"]


def _asking(
    rng: random.Random,
    server: ServerConfig,
    prefix: object,
    *,
    prompt_len: int = 1,
    max_new_tokens: int = 1,
    **fields: object,
) -> FuzzRequest:
    return FuzzRequest(
        prompt=tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(prompt_len)),
        max_new_tokens=max_new_tokens,
        priority=rng.choice([1, 1, 2, 9]) if server.priority else None,
        prefix=prefix,
        **fields,  # type: ignore[arg-type]
    )


def _user(rng: random.Random, server: ServerConfig, name: str, **fields: object) -> FuzzRequest:
    sizes = {"prompt_len": rng.randint(1, 12), "max_new_tokens": rng.randint(1, server.capacity + 2 * server.buffer)}
    return _asking(rng, server, name, **sizes, **fields)


def _requests(rng: random.Random, schedule: Schedule, makers: list[FuzzRequest]) -> list[FuzzRequest]:
    """Return makers, and the requests that were drawn before, of which most go on from one of theirs."""
    server, shift = schedule.server, len(makers)
    held = sum(maker.prefix["budget"] for maker in makers)
    requests = list(makers)
    for drawn in schedule.requests:
        request = drawn if drawn.after is None else replace(drawn, after=drawn.after + shift)
        request = _with_room(request, server, held)
        before = None if request.after is None else requests[request.after]
        use = rng.random()
        if request.garbage or use >= 0.7 or (before is not None and not before.asks("use") and use >= 0.2):
            requests.append(request)
            continue
        maker = rng.randrange(len(makers))
        name = before.prefix if before is not None and before.asks("use") else makers[maker].prefix["create"]
        # What nobody wants of a prompt that follows a prefix.
        request = replace(request, prefix=name, prompt_budget=None, prompt_logprobs=False)
        if before is None and rng.random() < 0.85:
            # Else it comes when there may be no such prefix.
            maker = next(i for i, one in enumerate(makers) if one.prefix["create"] == name)
            request = replace(request, after=maker)
        if is_tight(server) and request.max_new_tokens > 100:
            # Two of them run at once.
            request = replace(request, prompt=request.prompt[: max(len(request.prompt) - held, 1)])
        requests.append(request)
    return requests


def _with_room(request: FuzzRequest, server: ServerConfig, held: int) -> FuzzRequest:
    """Return a request without a policy that fits beside the prefixes, and beyond one; others as they are."""
    if not request.no_policy:
        return request
    room = server.pool - most_prompt(is_tight(server)) - 3 * server.page_size - 4 - 2 * held
    is_room = room >= 1
    return replace(
        request, no_policy=is_room, max_new_tokens=min(request.max_new_tokens, room) if is_room else server.capacity
    )


def _deletions(
    rng: random.Random, server: ServerConfig, requests: list[FuzzRequest], makers: list[FuzzRequest]
) -> list[FuzzRequest]:
    """Return requests that delete prefixes, and some that make one of the same name anew and use that."""
    deletions: list[FuzzRequest] = []
    for number, maker in enumerate(makers):
        name = maker.prefix["create"]
        if rng.random() >= 0.55:
            continue
        users = [i for i, request in enumerate(requests) if request.asks("use") and request.prefix == name]
        after = rng.choice([number, number, None, *users[:2]])
        at_pass = rng.choice([0, 1, rng.randrange(0, 60)])
        deletions.append(_asking(rng, server, {"delete": name}, after=after, at_pass=at_pass))
        if rng.random() < 0.5 and server.block is None:
            others = [one for one in (*makers, *deletions) if one.asks("create") and one.prefix["create"] == name]
            anew = _maker(rng, server, name, {_sizes(one) for one in others})
            place = len(requests) + len(deletions)
            deletions.append(replace(anew, after=place - 1, at_pass=rng.choice([0, 0, 5]), abort_at=None))
            deletions += [_user(rng, server, name, after=place) for _ in range(rng.randint(1, 2))]
    return deletions


def _events(rng: random.Random, events: tuple[Event, ...]) -> tuple[Event, ...]:
    """Return events with a flush, which does something where nothing runs: at the end, and in a pause."""
    more = list(events)
    if rng.random() < 0.15:
        start = rng.randrange(5, 60)
        kinds = ("pause_retract", "flush", "continue")
        more += [Event(at_pass=start + offset, kind=kind) for kind, offset in zip(kinds, (0, 2, 4), strict=True)]
    if rng.random() < 0.1:
        more.append(Event(at_pass=rng.randrange(20, 150), kind="flush"))
    return tuple(sorted(more, key=lambda event: event.at_pass))
