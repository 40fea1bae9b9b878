"""What must hold in the pool machine after its steps."""

import array
from typing import Any

import torch
from rkv_census import census
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from rkv_sglang.config import NUM_FIRST_KEPT
from rkv_sglang.integration.runtime.requests import state_of
from tests.fuzz.pool.held import Held, Wrong
from tests.fuzz.pool.pools import MAX_REQUESTS, Pools, rank_of


def take_compactions(pools: Pools, held: Held) -> int:
    """Check what compactions, of its prompt and then of its answer, have kept of a request; return how many there were.

    Mutates what it must hold.
    """
    req, config = held.req, pools.runtime.config_of(held.req)
    assert config is not None
    prompt_len, resident_len = state_of(req).held_prompt_len, held.numbers.shape[1]
    of_prompt, of_answer = prompt_len < held.prompt_len, False
    if of_prompt:
        if prompt_len != config.prompt_budget:
            raise Wrong(f"{req.rid} keeps {prompt_len} tokens of its prompt instead of {config.prompt_budget}")
        resident_len -= held.prompt_len - prompt_len
        num_best = prompt_len - NUM_FIRST_KEPT - config.window
        held.numbers = kept_of(held.numbers, NUM_FIRST_KEPT, held.prompt_len - config.window, num_best)
        held.prompt_len = prompt_len
    if req.kv.kv_allocated_len < resident_len:
        of_answer = True
        if req.kv.kv_allocated_len != prompt_len + config.budget:
            raise Wrong(f"{req.rid} was compacted from {resident_len} to {req.kv.kv_allocated_len} tokens")
        held.numbers = kept_of(held.numbers, prompt_len, resident_len - config.window, config.budget - config.window)
    check_held(pools, held)
    return of_prompt + of_answer


def kept_of(numbers: torch.Tensor, start: int, end: int, num_best: int) -> torch.Tensor:
    """Return what every layer and head keeps: all but those from ``start`` to ``end``, of which the best stay."""
    of_rows = []
    for row, own in enumerate(numbers):
        order = rank_of(own[start:end], row).argsort(descending=True, stable=True)
        best = own[start:end][order[:num_best].sort().values]
        of_rows.append(torch.cat([own[:start], best, own[end:]]))
    return torch.stack(of_rows)


def check_held(pools: Pools, held: Held) -> None:
    """Check that a running request holds what it must, and no more than it may."""
    req = held.req
    found = pools.read(pools.slots(req))
    if found.shape != held.numbers.shape:
        raise Wrong(f"{req.rid} holds {found.shape[1]} tokens instead of {held.numbers.shape[1]}")
    if not torch.equal(found, held.numbers):
        places = (found != held.numbers).any(dim=0).nonzero().flatten().tolist()
        raise Wrong(f"{req.rid} holds other KV at {places[:9]} of {req.kv.kv_allocated_len}")
    config = pools.runtime.config_of(req)
    assert config is not None
    private = req.kv.kv_allocated_len - held.prompt_len
    if private > config.capacity and pools.runtime.may_compact(req) and not req.retraction_count:
        raise Wrong(f"{req.rid} holds {private} generated tokens, and its capacity is {config.capacity}")


def check_copy(held: Held, copy: Any) -> None:
    """Check that a copy on the host has what its request held."""
    copied = torch.cat([layer[:, :, 0].T for layer in copy.keys])
    if not torch.equal(copied.long(), held.numbers):
        raise Wrong(f"the copy of {held.req.rid} is not what it held")


def check_found(pools: Pools, tokens: list[int]) -> None:
    """Check that what the tree has of a document is what belongs there."""
    found = pools.tree.match_prefix(MatchPrefixParams(key=RadixKey(array.array("q", tokens))))
    slots = pools.tree.path_device_indices(found.last_device_node)[: found.device_prefix_len].long()
    expected = torch.tensor(pools.numbers(tokens[: len(slots)]), dtype=torch.int64)
    if len(slots) and not (pools.read(slots) == expected).all():
        raise Wrong("the tree has the KV of other tokens")


def check_all(pools: Pools, running: list[Held], num_locked: int = 0) -> None:
    """Check every running request, the tree, of which so many slots are locked for good, and who owns each page."""
    for held in running:
        check_held(pools, held)
    tree_slots = pools.tree.all_values_flatten().long()
    private = {}
    for held in running:
        kv = held.req.kv
        own = pools.slots(held.req)[kv.cache_protected_len :]
        private[held.req.rid] = own[:: pools.page_size] // pools.page_size
    for kind, detail in census(pools.allocator, tree_slots, private):
        raise Wrong(f"{kind}: {detail}")
    if pools.rows.available_size() + len(running) != MAX_REQUESTS:
        raise Wrong("rows of the index map are lost")
    if not running and pools.free() != pools.size - num_locked:
        raise Wrong(f"{pools.free()} of {pools.size} slots are free, and nobody runs")
