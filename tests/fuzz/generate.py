"""From one integer to a schedule. Seeds of one block share a server, so one scheduler process runs them all."""

import random
from dataclasses import replace
from typing import Any

from devtools.tiny_models import EOS_ID, IMAGE_MODEL, SLIDING_WINDOW, VOCAB_SIZE
from rkv_sglang.config import HEAD, NUM_FIRST_KEPT, REQUEST
from rkv_sglang.policies import POLICIES, granularities_of, is_blind
from rkv_sglang.sizes.compaction_plan import block_of_pages
from tests.fuzz.schedule import CALIBRATION_ROOM, SLIDING_MODEL, Event, FuzzRequest, Schedule, ServerConfig

# Every policy in every way that it can choose.
WAYS = [(name, way) for way in (HEAD, REQUEST) for name, policy in POLICIES.items() if way in granularities_of(policy)]
# Each in turn has all of these: overlap scheduling, the radix cache.
SWITCHES = [(True, True), (False, True), (True, False), (False, False)]
# What every second server is of: a model, or the numbers of the pool.
KINDS = ("fp8_e4m3", SLIDING_MODEL, "qwen3-moe", IMAGE_MODEL, "fp8_e5m2")
# They ask how positions turn keys: known of one kind of rotation, and asked for at every start.
_ASK_THE_MODEL = ("triattention", "beaconkv")
# Schedules of one server.
BLOCK = 25
MOST_NEW_TOKENS = 80
# Tokens that greedy answers of the tiny models often have, so that one of them ends an answer.
COMMON_TOKENS = tuple(range(3, VOCAB_SIZE, 7))


def schedule_of(seed: int) -> Schedule:
    """Return the schedule of a seed."""
    server = server_of(seed // BLOCK)
    rng = random.Random(f"schedule {seed}")
    requests = _with_prompt_budgets(seed, server, _requests(rng, server))
    return Schedule(seed=seed, server=server, requests=tuple(requests), events=tuple(_events(rng)))


def server_of(block: int) -> ServerConfig:
    """Return the server that all schedules of a block share."""
    rng = random.Random(f"server {block}")
    policy, granularity = WAYS[block % len(WAYS)]
    overlap, radix = SWITCHES[block // len(WAYS) % len(SWITCHES)]
    page_size = rng.choice([1, 1, 4, 16])
    # Tokens that are dropped together.
    unit = 1
    if granularity == REQUEST:
        page_size = rng.choice([1, 4, 16, 32])
        unit = block_of_pages(page_size)
    window = rng.choice([1, 1, 2, 3, 4, 8])
    budget = window + max(unit - 1, 1) + rng.choice([0, 0, 1, 2, 4, 7, 12])
    buffer = rng.choice([1, 2, 3, 5, 8, 12, 16]) if unit == 1 else unit * rng.choice([1, 1, 2, 3])
    tight = rng.random() < 0.4
    # Two ranks take the time of many schedules.
    tp_size = 2 if block % 13 == 9 else 1
    sees_nothing = granularity == REQUEST and is_blind(POLICIES[policy])
    model = rng.choice(["llama-gqa", "llama-gqa", "qwen3", "llama-mqa"] if tp_size == 1 else ["llama-gqa"])
    kind = _kind_of(block, policy) if tp_size == 1 else None
    if kind == SLIDING_MODEL:
        # What is kept of all layers must hold what such a layer attends to.
        if granularity == REQUEST:
            budget, window = budget + SLIDING_WINDOW - window, SLIDING_WINDOW
        budget = max(budget, SLIDING_WINDOW)
    kv_dtype = "auto"
    if kind is not None and kind.startswith("fp8"):
        kv_dtype = kind
    elif kind is not None:
        model = kind
    chunk_size = rng.choice([0, 0, 16, 32])
    mixes = sees_nothing and rng.random() < 0.3
    if mixes:
        # SGLang counts the requests that decode as part of a chunk.
        chunk_size = max(32, 2 * page_size)
    # A request of its own settings may hold more than the server's.
    least = _most_prompt(tight) + budget + buffer + window + max(24, 2 * unit)
    slots = least * rng.choice([2, 3]) // 2 if tight else 640
    if policy == "triattention":
        slots = max(slots, CALIBRATION_ROOM + 2 * page_size)
    return ServerConfig(
        policy=policy,
        granularity=granularity,
        budget=budget,
        buffer=buffer,
        window=window,
        page_size=page_size,
        chunk_size=max(chunk_size, page_size) if chunk_size else 0,
        overlap=overlap,
        radix=radix,
        stagger=rng.random() < 0.35,
        priority=rng.random() < 0.3,
        pool=-(-slots // page_size) * page_size + page_size,
        max_running=rng.choice([2, 3, 4]) if tight else rng.choice([4, 8, 16]),
        tp_size=tp_size,
        tokenizer=rng.random() < 0.3,
        model=model,
        mixed_chunk=mixes,
        kv_dtype=kv_dtype,
        prompt_budget=_prompt_budget(f"prompts {block}", kind, window, unit),
    )


def _kind_of(block: int, policy: str) -> str | None:
    """Return what is other than a plain model and pool; drawn apart, so that other seeds stay what they were."""
    rng = random.Random(f"kind {block}")
    kind = rng.choice(KINDS) if rng.random() < 0.5 else None
    is_served = policy not in _ASK_THE_MODEL or kind is None or kind.startswith("fp8")
    return kind if is_served else None


def _prompt_budget(seed: str, model: str | None, window: int, unit: int) -> int:
    """Return 0 or what is kept of longer prompts; drawn apart, as kinds are."""
    rng = random.Random(seed)
    if (model == SLIDING_MODEL and unit == 1) or rng.random() < 0.5:
        return 0
    least = window + (NUM_FIRST_KEPT + 1 if unit == 1 else 2 * unit)
    return least + rng.choice([0, 0, 1, 4, 11])


def _with_prompt_budgets(seed: int, server: ServerConfig, requests: list[FuzzRequest]) -> list[FuzzRequest]:
    """Give some requests a prompt budget of their own."""
    rng = random.Random(f"prompts of {seed}")
    drawn = [
        _prompt_budget(f"{seed} {number}", server.model, server.window, server.block or 1)
        if rng.random() < 0.45 and not request.no_policy
        else None
        for number, request in enumerate(requests)
    ]
    return [replace(request, prompt_budget=own) for request, own in zip(requests, drawn, strict=True)]


def is_tight(server: ServerConfig) -> bool:
    """Return whether histories do not fit the pool, so that who is preempted is restored."""
    return server.pool < 600


def _most_prompt(tight: bool) -> int:
    return 24 if tight else 70


def _requests(rng: random.Random, server: ServerConfig) -> list[FuzzRequest]:
    requests: list[FuzzRequest] = []
    wanted = rng.randint(2, 7)
    while len(requests) < wanted:
        first = _request(rng, server, requests)
        requests.append(first)
        if rng.random() < 0.07:
            requests += _parallel_samples(rng, requests, first)
    return requests


def _request(rng: random.Random, server: ServerConfig, before: list[FuzzRequest]) -> FuzzRequest:
    tight = is_tight(server)
    fields: dict[str, Any] = {}
    budget, buffer, unit = server.budget, server.buffer, server.block or 1
    kind = rng.random()
    if kind < 0.25:
        budget = server.least_budget + rng.randint(0, 11)
        buffer = rng.randint(1, 10) if unit == 1 else unit * rng.randint(1, 2)
        fields |= {"budget": budget, "buffer": buffer}
    elif kind < 0.33:
        fields["no_policy"] = True
    elif kind < 0.35:
        fields["garbage"] = True
    capacity = budget + buffer
    lengths = [1, 2, capacity - 1, capacity, capacity + 1, capacity + 2, capacity + buffer + 1, capacity + 2 * buffer]
    longest = MOST_NEW_TOKENS if unit == 1 else min(capacity + 3 * buffer + 8, 200)
    if tight and rng.random() < 0.3:
        longest = max(longest, 130)
    lengths += [rng.randint(1, longest) for _ in range(5)] + [longest]
    max_new_tokens = min(max(rng.choice(lengths), 1), longest)
    prompt = _prompt(rng, server, before)
    if before and rng.random() < 0.15 and not tight:
        after = rng.randrange(len(before))
        # One turn more: what is found of the turn before is what the tree kept of it.
        if not before[after].continues and not before[after].garbage and before[after].abort_at is None:
            fields |= {"after": after, "continues": rng.random() < 0.7}
            prompt = prompt[:9]
    if fields.get("no_policy"):
        # Stock SGLang cuts what does not fit the pool.
        max_new_tokens = min(max_new_tokens, server.pool - _most_prompt(tight) - 3 * server.page_size - 4)
        max_new_tokens = min(max_new_tokens, 60)
    fate = rng.random()
    if fate < 0.08:
        fields["abort_at"] = rng.randrange(0, 70)
    elif fate < 0.16:
        fields["abort_after"] = rng.randrange(0, max_new_tokens + 1)
    params = _params(rng, server)
    if server.priority:
        fields["priority"] = rng.choice([1, 1, 2, 9])
    return FuzzRequest(
        prompt=tuple(prompt),
        max_new_tokens=max_new_tokens,
        at_pass=rng.choice([0, 0, rng.randrange(0, 45)]),
        ignore_eos=rng.random() < 0.8 and "stop_token_ids" not in params,
        logprobs=rng.random() < 0.12,
        prompt_logprobs=rng.random() < 0.05,
        params=params,
        **fields,
    )


def _prompt(rng: random.Random, server: ServerConfig, before: list[FuzzRequest]) -> list[int]:
    most = _most_prompt(is_tight(server))
    page, chunk = server.page_size, server.chunk_size or 16
    edges = [1, 2, page - 1, page, page + 1, 2 * page, chunk - 1, chunk, chunk + 1, server.capacity]
    length = min(max(rng.choice([*edges, *(rng.randint(1, most) for _ in range(6))]), 1), most)
    own = [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]
    kind = rng.random()
    if not before or kind < 0.5:
        return own
    other = list(rng.choice(before).prompt)
    if kind < 0.62:
        return other
    return [*other[: rng.randint(1, len(other))], *own][:most]


def _params(rng: random.Random, server: ServerConfig) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.1:
        return {"stop_token_ids": rng.sample(COMMON_TOKENS, 12)}
    # Few tokens that take turns: one that is counted too often or too rarely shows at once.
    few = (
        {"logit_bias": {str(token): 90.0 for token in rng.sample(range(3, VOCAB_SIZE), 8)}}
        if rng.random() < 0.5
        else {}
    )
    if kind < 0.17:
        return {rng.choice(["frequency_penalty", "presence_penalty"]): rng.choice([0.5, 1.5]), **few}
    if kind < 0.21:
        return {"repetition_penalty": 1.3, **few}
    if server.tokenizer and kind < 0.26:
        return {"min_new_tokens": rng.randint(1, 40), "stop_token_ids": rng.sample(COMMON_TOKENS, 40)}
    if kind < 0.28:
        return {"logit_bias": {str(rng.randrange(3, VOCAB_SIZE)): 5.0, str(EOS_ID): 1.0}}
    if server.tokenizer and kind < 0.36:
        return {"stop": rng.sample(["a", "e", "qu", "z", "th", " s"], 2)}
    if server.tokenizer and kind < 0.42:
        return {"regex": rng.choice(["[a-d]{5,40}", "(ab|cd)+e", "[0-9]{3,30}x"])}
    return {}


def _parallel_samples(rng: random.Random, requests: list[FuzzRequest], first: FuzzRequest) -> list[FuzzRequest]:
    """Return what SGLang makes of n > 1: copies that arrive together once a first request has cached the prompt."""
    if first.after is not None or first.garbage:
        return []
    index = len(requests) - 1
    fields = {name: getattr(first, name) for name in FuzzRequest.__dataclass_fields__}
    copy = FuzzRequest(**{**fields, "after": index, "abort_at": None, "at_pass": 0})
    return [copy] * rng.randint(1, 3)


def _events(rng: random.Random) -> list[Event]:
    events: list[Event] = []
    if rng.random() < 0.35:
        events += [Event(at_pass=rng.randrange(3, 90), kind="retract") for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.22:
        start = rng.randrange(1, 80)
        length = rng.randint(1, 6)
        events.append(Event(at_pass=start, kind=rng.choice(["pause_retract", "pause_in_place"])))
        if rng.random() < 0.3:
            events.append(Event(at_pass=start + rng.randint(0, length), kind="flush"))
        events.append(Event(at_pass=start + length, kind="continue"))
    if rng.random() < 0.08:
        events.append(Event(at_pass=rng.randrange(0, 80), kind="flush"))
    if rng.random() < 0.03:
        events.append(Event(at_pass=rng.randrange(5, 80), kind="abort_all"))
    return sorted(events, key=lambda event: event.at_pass)
