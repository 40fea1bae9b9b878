"""Blocks that are dropped in the pool machine: settings that do so, and what must hold of each compaction."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace

import torch

from rkv_sglang.config import REQUEST, PolicyConfig
from rkv_sglang.policies import Places
from rkv_sglang.sizes.compaction_plan import block_of_pages
from rkv_sglang.sizes.pages import ceil_to_page
from tests.fuzz.pool.held import Held, Wrong
from tests.fuzz.pool.pools import Pools, rank_of

# By scores, for which the machine has a policy of its own, and by places.
POLICIES = ("rkv", "random_attention")
# Slots that a world has then: a block is more than most budgets are otherwise.
NUM_SLOTS = (140, 220, 360)


def dropping(rng: random.Random, window: int, page_size: int) -> PolicyConfig:
    """Return settings of a server that drops blocks."""
    block = block_of_pages(page_size)
    return _sized(rng, PolicyConfig(policy=rng.choice(POLICIES), granularity=REQUEST, window=window, block=block))


def own_settings(rng: random.Random, server: PolicyConfig) -> PolicyConfig:
    """Return the settings of a request, which may ask for its own; prompts are compacted where nothing is dropped."""
    if server.granularity == REQUEST:
        return _sized(rng, server) if rng.random() < 0.3 else server
    config = server
    if rng.random() < 0.3:
        config = replace(config, budget=config.window + rng.randint(1, 9), buffer=rng.randint(1, 9))
    if rng.random() < 0.2:
        config = replace(config, prompt_budget=rng.choice([0, config.least_prompt_budget]))
    return config


def _sized(rng: random.Random, config: PolicyConfig) -> PolicyConfig:
    # Of several blocks that may go some stay.
    budget = config.window + config.block * rng.choice([1, 2, 3]) - 1 + rng.randint(0, 9)
    return replace(config, budget=budget, buffer=config.block * rng.choice([1, 1, 2]))


@contextlib.contextmanager
def nothing_moves(pools: Pools) -> Iterator[None]:
    """See that not a bit of the pool changes, where blocks are dropped."""
    layers = [*pools.pool.k_buffer, *pools.pool.v_buffer] if pools.runtime.config.granularity == REQUEST else []
    before = [layer.clone() for layer in layers]
    yield
    if not all(torch.equal(*pair) for pair in zip(layers, before, strict=True)):
        raise Wrong("a compaction that only drops blocks wrote into the pool")


def check_drop(pools: Pools, held: Held, resident_len: int, config: PolicyConfig) -> torch.Tensor:
    """Check which blocks left a request that held ``resident_len`` tokens; return the numbers it holds now."""
    req, block = held.req, config.block
    prompt_len = held.prompt_len
    num_dropped = (resident_len - prompt_len - config.budget) // block
    if num_dropped < 1 or req.kv.kv_allocated_len != resident_len - num_dropped * block:
        raise Wrong(f"{req.rid} was compacted from {resident_len} to {req.kv.kv_allocated_len} tokens")
    droppable = range(-(-prompt_len // block), (resident_len - config.window) // block)
    found, scores = pools.read(pools.slots(req)), scores_of(pools, held.numbers, held.seen)
    check_blocks(req.rid, found, held.numbers, scores, block=block, droppable=droppable)
    return found


def check_blocks(
    who: str, found: torch.Tensor, numbers: torch.Tensor, scores: torch.Tensor, *, block: int, droppable: range
) -> None:
    """Check that the blocks that left are of those that may, and of the lowest means.

    Args:
        found: Numbers of what stayed, ``[num_layers * num_kv_heads, n]``.
        numbers: Of what was there, ``[num_layers * num_kv_heads, resident_len]``.
        scores: Of what was there, ``[resident_len]``.
    """
    places = {number: place for place, number in enumerate(numbers[0].tolist())}
    kept = [places.get(number, -1) for number in found[0].tolist()]
    gone = sorted(set(range(numbers.shape[1])).difference(kept))
    dropped = sorted({place // block for place in gone})
    if (
        kept != sorted(set(kept))
        or not torch.equal(found, numbers[:, kept])
        or gone != [number * block + offset for number in dropped for offset in range(block)]
        or not set(dropped) <= set(droppable)
    ):
        raise Wrong(f"{who} kept the tokens {kept} of {numbers.shape[1]}, in blocks of {block}")
    means = {number: float(scores[number * block : number * block + block].mean()) for number in droppable}
    rest = [mean for number, mean in means.items() if number not in dropped]
    # Sums in fp32 round.
    if rest and max(means[number] for number in dropped) > min(rest) + 1e-6 * max(means.values()):
        raise Wrong(f"{who} dropped the blocks {dropped}, and their means are {means}")


def scores_of(pools: Pools, numbers: torch.Tensor, seen: int) -> torch.Tensor:
    """Return what each of these tokens scores, of all layers and heads together, fp64.

    Args:
        numbers: ``[num_layers * num_kv_heads, resident_len]``.
        seen: Tokens that the request has seen.
    """
    resident_len = numbers.shape[1]
    if pools.runtime.looks_at_nothing:
        lens = (torch.full((resident_len,), count) for count in (resident_len, seen))
        scores: torch.Tensor = pools.runtime.policy.score_places(Places(torch.arange(resident_len), *lens))  # type: ignore[attr-defined]
        return scores.double()
    return torch.stack([rank_of(of_head, row) for row, of_head in enumerate(numbers)]).sum(dim=0).double()


def sizes_of_prefix(rng: random.Random, config: PolicyConfig, page_size: int) -> tuple[int, int]:
    """Return the length of a document and a budget for it; in blocks a little more than that may stay."""
    if config.granularity == REQUEST:
        budget = config.least_prompt_budget + rng.randint(0, config.block)
        return ceil_to_page(budget + config.block * rng.randint(1, 2), page_size), budget
    budget = ceil_to_page(config.least_prompt_budget, page_size) + page_size * rng.randint(0, 2)
    return budget + rng.randint(1, 20), budget
