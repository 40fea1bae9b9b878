"""The steps that the pool machine takes, on SGLang's pools, allocator and radix tree, without a server.

There is no model. What would be the KV of a token is a number of its own: of a token that full attention computed, the
number of all tokens up to it, so that equal prefixes hold equal numbers and may be shared; of one that was computed
over a compacted cache, a new one. Which numbers a request must hold is kept beside it, so a slot that was moved
wrongly, freed too early or written by somebody else shows.
"""

import array
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH
from sglang.srt.mem_cache.allocation import alloc_for_decode_default, alloc_for_extend
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.sampling.sampling_params import SamplingParams

from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.hooks import restore as hooks
from rkv_sglang.integration.runtime.prefixes.named import gap_of, made_by, used_by
from rkv_sglang.integration.runtime.requests import CONFIG_ATTRIBUTE, state_of
from rkv_sglang.integration.runtime.restore import host_copy_of, len_after_prefill, restore_waiting
from rkv_sglang.sizes.pages import ceil_to_page
from tests.fuzz.pool.checks import check_all, check_copy, check_found, check_held, take_compactions
from tests.fuzz.pool.drops import nothing_moves, own_settings, sizes_of_prefix
from tests.fuzz.pool.held import Held, PolicyReq, Wrong
from tests.fuzz.pool.pools import MAX_REQUESTS, Pools
from tests.fuzz.pool.prefixes import NamedPrefixes
from tests.fuzz.pool.room import Room

# Few, so that prompts meet and answers repeat.
TOKENS = range(3, 6)
NAMES = ("a", "b", "c")


@dataclass
class World:
    """All parts, and the steps that can be taken with them; each step checks what it touched."""

    seed: int
    page_size: int
    radix: bool
    verify: bool
    num_slots: int
    num_layers: int
    config: PolicyConfig
    running: list[Held] = field(default_factory=list)
    waiting: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.pools = Pools(
            page_size=self.page_size,
            radix=self.radix,
            verify=self.verify,
            num_slots=self.num_slots,
            num_layers=self.num_layers,
            config=self.config,
        )
        self.runtime = self.pools.runtime
        self._serial = 0
        self._compactions = 0
        self.room = Room(self.pools, self.config)
        self.prefixes = NamedPrefixes(self.pools, self.config)
        self._documents = [[self.rng.choice(TOKENS) for _ in range(40)] for _ in range(3)]

    # Steps.

    def admit(self) -> bool:
        """Take in a new request: a prompt that others may share, settings of its own, a length limit."""
        if len(self.running) >= MAX_REQUESTS or len(self.waiting) >= MAX_REQUESTS:
            return False
        document = self.rng.choice(self._documents)
        tokens = document[: self.rng.randint(0, 30)] + [self.rng.choice(TOKENS) for _ in range(self.rng.randint(1, 4))]
        config = own_settings(self.rng, self.config)
        req = self._request(tokens, config, self.rng.choice([config.capacity, 60, 400]))
        if self.prefixes.all and self.rng.random() < 0.5:
            self.prefixes.use(req, self.rng.choice(sorted(self.prefixes.all)))
        if not self.room.has(self.room.most_held(req) + 1, self.running):
            return False
        self._prefill(Held(req))
        return True

    def make_prefix(self) -> bool:
        """Take in a request that makes a named prefix of the first tokens of its prompt."""
        name = self.rng.choice(NAMES)
        if not self.radix or name in self.prefixes.all or len(self.running) >= MAX_REQUESTS:
            return False
        length, budget = sizes_of_prefix(self.rng, self.config, self.page_size)
        tokens = (self.rng.choice(self._documents) * 5)[: length + self.config.window + self.rng.randint(0, 3)]
        req = self._request(tokens, self.config, self.rng.choice([1, 30]))
        self.pools.scheduler.waiting_queue = [held.req for held in self.waiting]
        self.pools.scheduler.running_batch.reqs = [held.req for held in self.running]
        # Of whole blocks up to a block more stays.
        has_room = self.room.has(self.room.most_held(req) + budget + self.config.block, self.running)
        if has_room and self.prefixes.reserve(req, name, length, budget):
            self._prefill(Held(req))
            return True
        return False

    def delete_prefix(self) -> bool:
        """Delete a named prefix; who waits to go on from it is ended, who runs goes on."""
        if not self.prefixes.all:
            return False
        self.pools.scheduler.waiting_queue = []
        gone = self.prefixes.delete(self.rng.choice(sorted(self.prefixes.all)))
        self.waiting = [held for held in self.waiting if used_by(held.req) is not gone]
        return True

    def _request(self, tokens: list[int], config: PolicyConfig, max_new_tokens: int) -> Any:
        self._serial += 1
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0)
        req = PolicyReq(f"q{self._serial}", "", array.array("q", tokens), params, vocab_size=64)
        setattr(req, CONFIG_ATTRIBUTE, config)
        return req

    def _prefill(self, held: Held) -> None:
        """Give a request a row and slots, share what the tree has, compute or restore the rest."""
        req = held.req
        is_restored = host_copy_of(req) is not None
        req.init_next_round_input(self.pools.tree)
        if req.prefix_len > len(req.origin_input_ids) and self.runtime.may_compact(req):
            raise Wrong(f"{req.rid} would share {req.prefix_len} tokens, more than its prompt")
        req.lock = self.pools.tree.lock(req.last_node)
        req.extend_end = len(req.full_untruncated_fill_ids)
        batch = self.pools.batch([req], hisparse_coordinator=None, is_dllm=lambda: False)
        restore_waiting(batch)
        batch.prefix_lens, batch.extend_lens = [req.prefix_len], [req.extend_end - req.prefix_len]
        batch.seq_lens = batch.seq_lens_cpu = torch.tensor([req.extend_end])
        batch.extend_num_tokens = req.extend_end - req.prefix_len
        alloc_for_extend(batch)
        slots = self.pools.slots(req)
        tokens = [*req.origin_input_ids, *req.output_ids]
        if is_restored:
            # All but the last token came from the copy.
            last = torch.full((len(held.numbers), 1), self.pools.fresh())
            held.numbers = torch.cat([held.numbers[:, : req.extend_end - 1], last], dim=1)
            self.pools.write(slots[-1:], last[0, :1])
        else:
            held.numbers, held.prompt_len = self.prefixes.numbers_of(req), len(req.origin_input_ids)
            if (shared := self.prefixes.of(req)) is not None and req.prefix_len < shared.prefix.budget:
                raise Wrong(f"{req.rid} would compute what stands for prefix {shared.prefix.name!r}")
            self.pools.write(slots[req.prefix_len :], held.numbers[0, req.prefix_len :])
        held.seen = len(tokens) + gap_of(req)
        if made_by(req) is not None:
            self.prefixes.make(req, held.numbers[0], req.prefix_len)
        checkpoint_kv_cache(req, self.pools.tree)
        req.output_ids.append(self.rng.choice(TOKENS))
        self.running.append(held)
        check_held(self.pools, held)

    def _batch(self, members: list[Held]) -> Any:
        lens = torch.tensor([held.req.kv.kv_allocated_len for held in members])
        indices = torch.tensor([held.req.kv.req_pool_idx for held in members])
        return self.pools.batch(
            [held.req for held in members],
            batch_is_full=True,
            req_pool_indices=indices,
            req_pool_indices_cpu=indices,
            seq_lens=lens,
            seq_lens_cpu=lens,
            seq_lens_sum=None,
        )

    def decode(self) -> bool:
        """Compact what is due, then give every running request a token."""
        members = [held for held in self.running if self._can_decode(held)]
        if not members:
            return False
        self._decode(members, keep=True)
        return True

    def _can_decode(self, held: Held) -> bool:
        return len(held.req.output_ids) < held.req.sampling_params.max_new_tokens

    def _decode(self, members: list[Held], *, keep: bool) -> None:
        """``keep``: whether the token that is computed comes out; else its request is retracted with it in flight."""
        self.pools.scheduler.forward_ct += 1
        batch = self._batch(members)
        with nothing_moves(self.pools):
            self.runtime.before_decode(batch)
        for held in members:
            if held.req.kv.kv_allocated_len < held.numbers.shape[1]:
                self._compactions += take_compactions(self.pools, held)
                if batch.batch_is_full:
                    raise Wrong("slots were freed and the batch is said to be full")
        if self.runtime.stats.compactions != self._compactions:
            raise Wrong(f"{self.runtime.stats.compactions} compactions are counted of {self._compactions}")
        alloc_for_decode_default(batch, 1)
        slots, numbers = [], []
        for held in members:
            req = held.req
            req.decode_batch_idx += 1
            number = self.pools.fresh() if state_of(req).evicted_tokens else self.prefixes.numbers_of(req)[0, -1]
            numbers.append(number)
            slots.append(int(self.pools.rows.req_to_token[req.kv.req_pool_idx, req.kv.kv_allocated_len - 1]))
            added = torch.full((len(held.numbers), 1), number)
            held.numbers = torch.cat([held.numbers, added], dim=1)
            held.seen += 1
        self.pools.write(torch.tensor(slots), torch.tensor(numbers))
        self.pools.capture([held.req.kv.req_pool_idx for held in members], [held.seen - 1 for held in members])
        for held in members:
            if keep:
                held.req.output_ids.append(self.rng.choice(TOKENS))
        # The others have their turn when all are checked.
        check_held(self.pools, self.rng.choice(members))

    def finish(self) -> bool:
        """End a request; the tree keeps what it may."""
        return self._leave(checkpoint=True)

    def abort(self) -> bool:
        """End a request that waits, or one that runs."""
        if self.waiting and self.rng.random() < 0.5:
            held = self.waiting.pop(self.rng.randrange(len(self.waiting)))
            state_of(held.req).drop_tensors()
            return True
        return self._leave(checkpoint=True)

    def _leave(self, *, checkpoint: bool) -> bool:
        if not self.running:
            return False
        held = self.running.pop(self.rng.randrange(len(self.running)))
        held.req.finished_reason = FINISH_LENGTH(len(held.req.output_ids))
        release_kv_cache(held.req, self.pools.tree, checkpoint=checkpoint)
        return True

    def retract(self) -> bool:
        """Take a request's slots; it waits to be computed again, or restored from its copy."""
        if not self.running:
            return False
        held = self.running[self.rng.randrange(len(self.running))]
        if self.rng.random() < 0.5 and self._can_decode(held):
            self._decode([held], keep=False)
        self.running.remove(held)
        req = held.req
        hooks.copy_before_release(req=req)
        release_kv_cache(req, self.pools.tree, checkpoint=False)
        req.reset_for_retract()
        copy = host_copy_of(req)
        seen = len(req.origin_input_ids) + len(req.output_ids)
        if copy is not None:
            held.numbers = held.numbers[:, : copy.num_tokens]
            check_copy(held, copy)
        most = ceil_to_page(seen + self.room.until_compacted(req) + 1, self.page_size)
        if self.prefixes.lacks_its_own(req) or (copy is None and most > self.room.pool_size(req)):
            # A server would end it: its prefix is deleted, or neither fits.
            return True
        self.waiting.append(held)
        return True

    def readmit(self) -> bool:
        """Bring back the request that waits longest."""
        if not self.waiting or len(self.running) >= MAX_REQUESTS:
            return False
        held = self.waiting[0]
        most = len_after_prefill(held.req) + self.room.until_compacted(held.req) + 2
        if not self.room.has(max(most, self.room.most_held(held.req) + 1), self.running):
            if self.running or self.pools.free() < self.pools.size - self.prefixes.num_held:
                return False
            # Alone in an empty pool it has no room: a server would end it.
            self.waiting.pop(0)
            return True
        self.waiting.pop(0)
        self._prefill(held)
        return True

    def evict(self) -> bool:
        """Have the tree give up what nobody uses."""
        if not self.pools.tree.evictable_size():
            return False
        self.pools.tree.evict(EvictParams(num_tokens=self.rng.randint(1, 40)))
        return True

    def match(self) -> bool:
        """Look a document up; what is found must be what belongs there."""
        document = self.rng.choice(self._documents)
        check_found(self.pools, document[: self.rng.randint(1, len(document))])
        return True

    def flush(self) -> bool:
        """Empty all, as a server that is idle can be asked to."""
        if self.running or self.waiting:
            return False
        self.check_all()
        self.pools.tree.reset()
        self.pools.rows.clear()
        self.pools.allocator.clear()
        self.prefixes.drop()
        return True

    def check_all(self) -> None:
        """Check all that must hold."""
        check_all(self.pools, self.running, self.prefixes.num_held)
        self.prefixes.check_all()
