"""Named prefixes in the pool machine: made, gone on from, deleted, dropped by a flush."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from rkv_sglang.config import NUM_FIRST_KEPT, PolicyConfig
from rkv_sglang.integration.runtime.prefixes import reading
from rkv_sglang.integration.runtime.prefixes.asked import Asked
from rkv_sglang.integration.runtime.prefixes.making import make_prefixes
from rkv_sglang.integration.runtime.prefixes.named import Prefix, made_by, used_by
from tests.fuzz.pool.checks import kept_of
from tests.fuzz.pool.drops import check_blocks, scores_of
from tests.fuzz.pool.held import Wrong
from tests.fuzz.pool.pools import HEAD_DIM, NUM_KV_HEADS, NUM_QO_HEADS, Pools


@dataclass
class Shared:
    """A named prefix and what it must hold.

    Attributes:
        numbers: Of every token kept, ``[num_layers * num_kv_heads, budget]``, int64.
        root: Stands before the tokens that follow it, as a number of all before.
    """

    prefix: Prefix
    numbers: torch.Tensor
    root: int


class NamedPrefixes:
    """Those that are there, and who waits or runs, as the scheduler of the pools knows them."""

    def __init__(self, pools: Pools, config: PolicyConfig) -> None:
        self._pools, self._config = pools, config
        self._parts = pools.runtime.parts
        self.all: dict[str, Shared] = {}
        # Of those that were deleted: who runs goes on from them.
        self._roots: dict[str, Shared] = {}

    def of(self, req: Any) -> Shared | None:
        """Return what a request goes on from; it may be deleted."""
        prefix = used_by(req)
        return None if prefix is None else self._roots[prefix.key]

    def lacks_its_own(self, req: Any) -> bool:
        """Return whether the prefix that a request goes on from was deleted."""
        shared = self.of(req)
        return shared is not None and self.all.get(shared.prefix.name) is not shared

    def numbers_of(self, req: Any) -> torch.Tensor:
        """Return what a request holds whose tokens are all computed with full attention, in every layer and head."""
        tokens, shared = [*req.origin_input_ids, *req.output_ids], self.of(req)
        num_rows = self._pools.num_layers * NUM_KV_HEADS
        if shared is None:
            return torch.tensor(self._pools.numbers(tokens)).repeat(num_rows, 1)
        own = torch.tensor(self._pools.numbers(tokens[shared.prefix.budget :], shared.root))
        return torch.cat([shared.numbers, own.repeat(num_rows, 1)], dim=1)

    def reserve(self, req: Any, name: str, length: int, budget: int) -> bool:
        """Let a new request make a prefix, if there is room; return whether there is."""
        try:
            reading._reserve(self._parts, req, self._config, Asked("create", name, length, budget))
        except ValueError as error:
            if "does not fit the KV pool" not in str(error):
                raise
            return False
        return True

    def use(self, req: Any, name: str) -> None:
        """Let a new request go on from a prefix."""
        reading._use(self._parts, req, name)

    def make(self, req: Any, numbers: torch.Tensor, first: int) -> None:
        """Make the prefix of a request that was prefilled from ``first`` on, and check what is kept.

        Args:
            numbers: Of the tokens of document and task, ``[tokens]``, int64.
        """
        prefix = made_by(req)
        assert prefix is not None and prefix.judging is not None
        places = torch.arange(first, len(numbers), dtype=torch.float32)
        queries = places.view(-1, 1, 1).expand(-1, NUM_QO_HEADS, HEAD_DIM)
        for layer in range(self._pools.num_layers) if self._parts.scored is not None else ():
            prefix.judging.see(layer, queries, first)
        forward_mode = SimpleNamespace(is_extend=lambda: True)
        make_prefixes(self._parts, self._pools.runtime.policy, SimpleNamespace(forward_mode=forward_mode, reqs=[req]))
        if not prefix.is_made:
            raise Wrong(f"the prefix of {req.rid} was not made: {req.to_finish}")
        shared = Shared(prefix, self._kept(prefix, numbers), self._pools.fresh())
        self.all[prefix.name] = self._roots[prefix.key] = shared
        self.check(shared)

    def _kept(self, prefix: Prefix, numbers: torch.Tensor) -> torch.Tensor:
        """Return what must have been kept of a document; in blocks what was, once it is seen to be right.

        Args:
            numbers: Of the tokens of document and task, ``[tokens]``, int64.
        """
        rows = numbers.repeat(self._pools.num_layers * NUM_KV_HEADS, 1)
        length, block, last = prefix.length, prefix.block, prefix.length - prefix.window
        if block is None:
            return kept_of(rows[:, :length], NUM_FIRST_KEPT, last, prefix.budget - NUM_FIRST_KEPT - prefix.window)
        scores = scores_of(self._pools, rows, len(numbers))[:length]
        droppable = range(-(-NUM_FIRST_KEPT // block), last // block)
        found = self._pools.read(self._slots_of(prefix))
        check_blocks(f"prefix {prefix.name!r}", found, rows[:, :length], scores, block=block, droppable=droppable)
        return found

    def _slots_of(self, prefix: Prefix) -> torch.Tensor:
        """Return the slots that the tree has for a prefix."""
        found = self._pools.tree.match_prefix(MatchPrefixParams(key=RadixKey(prefix.ids, prefix.key)))
        slots = self._pools.tree.path_device_indices(found.last_device_node)[: found.device_prefix_len].long()
        if len(slots) != prefix.budget:
            raise Wrong(f"of prefix {prefix.name!r} the tree has {len(slots)} of {prefix.budget} slots")
        return slots

    def check(self, shared: Shared) -> None:
        """Check that a prefix is in the tree, locked, with what it must hold."""
        if not torch.equal(self._pools.read(self._slots_of(shared.prefix)), shared.numbers):
            raise Wrong(f"prefix {shared.prefix.name!r} holds the KV of other tokens")

    def check_all(self) -> None:
        """Check all that are there, and that no others are known."""
        known = {prefix.name for prefix in self._parts.prefixes.all()}
        if known != set(self.all):
            raise Wrong(f"known are the prefixes {sorted(known)} instead of {sorted(self.all)}")
        for shared in self.all.values():
            self.check(shared)

    @property
    def num_held(self) -> int:
        """Slots that they hold, whoever uses them."""
        return sum(shared.prefix.budget for shared in self.all.values())

    def delete(self, name: str) -> Prefix:
        """Delete one; return it."""
        reading._delete(self._parts, name)
        return self.all.pop(name).prefix

    def drop(self) -> None:
        """Drop all, after the cache was flushed."""
        reading.drop_prefixes(self._parts)
        self.all.clear()
