"""What must hold in the pool machine after its steps."""

import torch
from rkv_census import census

from tests.fuzz.pool.held import Held, Wrong
from tests.fuzz.pool.pools import MAX_REQUESTS, Pools, rank_of


def check_compaction(pools: Pools, held: Held, resident_len: int) -> torch.Tensor:
    """Check what a compaction kept of a request that held ``resident_len`` tokens; return the numbers it holds now."""
    req, config = held.req, pools.runtime.config_of(held.req)
    assert config is not None
    prompt_len = len(req.origin_input_ids)
    if req.kv.kv_allocated_len != prompt_len + config.budget or resident_len < prompt_len + config.budget + 1:
        raise Wrong(f"{req.rid} was compacted from {resident_len} to {req.kv.kv_allocated_len} tokens")
    found = pools.read(pools.slots(req))
    for row in range(len(found)):
        places = {number: place for place, number in enumerate(held.numbers[row].tolist())}
        kept = [places.get(number, -1) for number in found[row].tolist()]
        rest = kept[prompt_len:]
        newest = list(range(resident_len - config.window, resident_len))
        if kept[:prompt_len] != list(range(prompt_len)):
            raise Wrong(f"a compaction of {req.rid} changed its prompt")
        if rest != sorted(set(rest)) or min(rest) < prompt_len or rest[-config.window :] != newest:
            raise Wrong(f"{req.rid} kept the tokens {rest} of {resident_len}")
        best = rank_of(held.numbers[row], row)[prompt_len : resident_len - config.window]
        top = best.topk(config.budget - config.window).indices.sort().values + prompt_len
        if rest[: -config.window] != top.tolist() and len(set(best.tolist())) == len(best):
            raise Wrong(f"{req.rid} kept {rest} and not its best, {top.tolist()}")
    return found


def check_held(pools: Pools, held: Held) -> None:
    """Check that a running request holds what it must, and no more than it may."""
    req = held.req
    found = pools.read(pools.slots(req))
    if not torch.equal(found, held.numbers):
        places = (found != held.numbers).any(dim=0).nonzero().flatten().tolist()
        raise Wrong(f"{req.rid} holds other KV at {places[:9]} of {req.kv.kv_allocated_len}")
    config = pools.runtime.config_of(req)
    assert config is not None
    private = req.kv.kv_allocated_len - len(req.origin_input_ids)
    if private > config.capacity and pools.runtime.may_compact(req) and not req.retraction_count:
        raise Wrong(f"{req.rid} holds {private} generated tokens, and its capacity is {config.capacity}")


def check_all(pools: Pools, running: list[Held]) -> None:
    """Check every running request, the tree, and who owns each page."""
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
    if not running and pools.free() != pools.size:
        raise Wrong(f"{pools.free()} of {pools.size} slots are free, and nobody runs")
