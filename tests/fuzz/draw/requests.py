"""The requests of a schedule."""

import random
from typing import Any

from devtools.tiny_models import EOS_ID, VOCAB_SIZE
from tests.fuzz.draw.servers import is_tight, most_prompt
from tests.fuzz.schedule import FuzzRequest
from tests.fuzz.server import ServerConfig

MOST_NEW_TOKENS = 80
# Tokens that greedy answers of the tiny models often have, so that one of them ends an answer.
COMMON_TOKENS = tuple(range(3, VOCAB_SIZE, 7))


def draw_requests(rng: random.Random, server: ServerConfig) -> list[FuzzRequest]:
    """Return requests that may share prompts, wait for each other, and ask for settings of their own."""
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
        max_new_tokens = min(max_new_tokens, server.pool - most_prompt(tight) - 3 * server.page_size - 4)
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
    most = most_prompt(is_tight(server))
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
