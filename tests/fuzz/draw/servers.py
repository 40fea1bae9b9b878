"""From one integer to a server's settings."""

import random

from devtools.tiny_models import IMAGE_MODEL, SINKS_MODEL, SLIDING_WINDOW
from rkv_sglang.config import HEAD, REQUEST
from rkv_sglang.policies import POLICIES, granularities_of, is_blind, observes
from rkv_sglang.sizes.compaction_plan import block_of_pages
from tests.fuzz.draw.prompts import draw_prompt_budget
from tests.fuzz.server import CALIBRATION_ROOM, SLIDING_MODELS, ServerConfig

# Every policy in every way that it can choose.
WAYS = [(name, way) for way in (HEAD, REQUEST) for name, policy in POLICIES.items() if way in granularities_of(policy)]
# Each in turn has all of these: overlap scheduling, the radix cache.
SWITCHES = [(True, True), (False, True), (True, False), (False, False)]
# What every second server is of: a model, or the numbers of the pool.
EXPERTS_MODEL = "qwen3-moe"
KINDS = ("fp8_e4m3", SLIDING_MODELS[0], EXPERTS_MODEL, IMAGE_MODEL, "fp8_e5m2")
# They ask how positions turn keys: known of one kind of rotation, and asked for at every start.
_ASK_THE_MODEL = ("triattention", "beaconkv")
# Of whom histories do not fit the pool.
_TIGHT_POOL = 600


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
    # Two ranks take the time of many schedules. What is observed is observed by one.
    tp_size = 2 if block % 13 == 9 and not observes(POLICIES[policy]) else 1
    sees_nothing = granularity == REQUEST and is_blind(POLICIES[policy])
    model = rng.choice(["llama-gqa", "llama-gqa", "qwen3", "llama-mqa"] if tp_size == 1 else ["llama-gqa"])
    kind = _kind_of(block, policy) if tp_size == 1 else None
    if kind in SLIDING_MODELS:
        # What is kept of all layers must hold what such a layer attends to.
        if granularity == REQUEST:
            budget, window = budget + SLIDING_WINDOW - window, SLIDING_WINDOW
        budget = max(budget, SLIDING_WINDOW)
    kv_dtype = "auto"
    if kind is not None and kind.startswith("fp8"):
        kv_dtype = kind
    elif kind is not None:
        model = kind
    attn_dp_size = 1
    # Drawn apart, so that other seeds stay what they were.
    if kind == EXPERTS_MODEL and random.Random(f"ranks {block}").random() < 0.5:
        tp_size = attn_dp_size = 2
    chunk_size = rng.choice([0, 0, 16, 32])
    mixes = sees_nothing and rng.random() < 0.3 and attn_dp_size == 1
    if mixes:
        # SGLang counts the requests that decode as part of a chunk.
        chunk_size = max(32, 2 * page_size)
    # A request of its own settings may hold more than the server's.
    least = most_prompt(tight) + budget + buffer + window + max(24, 2 * unit)
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
        # With images SGLang loads a processor of them beside it, which the tiny model lacks.
        tokenizer=rng.random() < 0.3 and kind != IMAGE_MODEL,
        model=model,
        mixed_chunk=mixes,
        kv_dtype=kv_dtype,
        attn_dp_size=attn_dp_size,
        prompt_budget=draw_prompt_budget(random.Random(f"prompts {block}"), kind, window, unit),
    )


def _kind_of(block: int, policy: str) -> str | None:
    """Return what is other than a plain model and pool; drawn apart, so that other seeds stay what they were."""
    rng = random.Random(f"kind {block}")
    kind = rng.choice(KINDS) if rng.random() < 0.5 else None
    # Served as those, and several times as slow: their kernels are interpreted.
    if kind in SLIDING_MODELS and random.Random(f"sinks {block}").random() < 0.3:
        kind = SINKS_MODEL
    is_served = policy not in _ASK_THE_MODEL or kind is None or kind.startswith("fp8")
    return kind if is_served else None


def is_tight(server: ServerConfig) -> bool:
    """Return whether histories do not fit the pool, so that who is preempted is restored."""
    return server.pool < _TIGHT_POOL


def most_prompt(tight: bool) -> int:
    """Return the most tokens of a prompt."""
    return 24 if tight else 70
