"""The steps that the pool machine takes, on SGLang's pools, allocator and radix tree, without a server.

There is no model. What would be the KV of a token is a number of its own: of a token that full attention computed, the
number of all tokens up to it, so that equal prefixes hold equal numbers and may be shared; of one that was computed
over a compacted cache, a new one. Which numbers a request must hold is kept beside it, so a slot that was moved
wrongly, freed too early or written by somebody else shows.
"""

import array
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH
from sglang.srt.mem_cache.allocation import alloc_for_decode_default, alloc_for_extend
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.sampling.sampling_params import SamplingParams

from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.hooks import restore as hooks
from rkv_sglang.integration.runtime.requests import CONFIG_ATTRIBUTE, state_of
from rkv_sglang.integration.runtime.restore import host_copy_of, len_after_prefill, restore_waiting
from rkv_sglang.sizes.pages import ceil_to_page
from tests.fuzz.pool.checks import check_all, check_compaction, check_held
from tests.fuzz.pool.held import Held, PolicyReq, Wrong
from tests.fuzz.pool.pools import MAX_REQUESTS, NUM_KV_HEADS, Pools

# Few, so that prompts meet and answers repeat.
TOKENS = range(3, 6)


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
        self._documents = [[self.rng.choice(TOKENS) for _ in range(40)] for _ in range(3)]

    # Room.

    def _reserved(self) -> int:
        """Tokens that those that run may still need."""
        total = 0
        for held in self.running:
            # One that was computed again holds its whole history until its next compaction.
            most = max(self._most_held(held.req), held.req.kv.kv_allocated_len + self.config.window + 1)
            total += ceil_to_page(most + 1, self.page_size) - ceil_to_page(held.req.kv.kv_allocated_len, self.page_size)
        return total

    def _most_held(self, req: Any) -> int:
        """Return the tokens that are kept for a request, the prompt's and as many more as there is a query row for."""
        config = self.runtime.config_of(req)
        assert config is not None
        capacity = max(config.capacity, self.config.capacity) if self.runtime.may_compact(req) else config.capacity
        # Alone in the pool it needs no more than that has: there is always one row.
        prompt_len = len(req.origin_input_ids)
        return max(min(prompt_len + capacity, self.pools.size - 1), prompt_len + config.capacity)

    # Steps.

    def admit(self) -> bool:
        """Take in a new request: a prompt that others may share, settings of its own, a length limit."""
        if len(self.running) >= MAX_REQUESTS or len(self.waiting) >= MAX_REQUESTS:
            return False
        document = self.rng.choice(self._documents)
        tokens = document[: self.rng.randint(0, 30)] + [self.rng.choice(TOKENS) for _ in range(self.rng.randint(1, 4))]
        config = self.config
        if self.rng.random() < 0.3:
            config = replace(config, budget=config.window + self.rng.randint(1, 9), buffer=self.rng.randint(1, 9))
        self._serial += 1
        params = SamplingParams(max_new_tokens=self.rng.choice([config.capacity, 60, 400]), temperature=0)
        req = PolicyReq(f"q{self._serial}", "", array.array("q", tokens), params, vocab_size=64)
        setattr(req, CONFIG_ATTRIBUTE, config)
        if self.pools.free() - self._reserved() < ceil_to_page(self._most_held(req) + 1, self.page_size):
            return False
        self._prefill(Held(req, torch.empty(0), 0))
        return True

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
            numbers = torch.tensor(self.pools.numbers(tokens))
            self.pools.write(slots[req.prefix_len :], numbers[req.prefix_len :])
            held.numbers = numbers.repeat(self.num_layers * NUM_KV_HEADS, 1)
        held.seen = len(tokens)
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
        before = [held.req.kv.kv_allocated_len for held in members]
        self.runtime.before_decode(batch)
        for held, resident_len in zip(members, before, strict=True):
            if held.req.kv.kv_allocated_len != resident_len:
                held.numbers = check_compaction(self.pools, held, resident_len)
                self._compactions += 1
                if batch.batch_is_full:
                    raise Wrong("slots were freed and the batch is said to be full")
        if self.runtime.stats.compactions != self._compactions:
            raise Wrong(f"{self.runtime.stats.compactions} compactions are counted of {self._compactions}")
        alloc_for_decode_default(batch, 1)
        slots, numbers = [], []
        for held in members:
            req = held.req
            req.decode_batch_idx += 1
            tokens = [*req.origin_input_ids, *req.output_ids]
            number = self.pools.fresh() if state_of(req).evicted_tokens else self.pools.numbers(tokens)[-1]
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
            copied = torch.cat([layer[:, :, 0].T for layer in copy.keys])
            if not torch.equal(copied.long(), held.numbers):
                raise Wrong(f"the copy of {req.rid} is not what it held")
        if copy is None and ceil_to_page(seen + self._window_of(held) + 1, self.page_size) > self.pools.size:
            # Neither fits: a server would end it.
            return True
        self.waiting.append(held)
        return True

    def _window_of(self, held: Held) -> int:
        config = self.runtime.config_of(held.req)
        assert config is not None
        return max(config.window, config.capacity - len(held.req.output_ids))

    def readmit(self) -> bool:
        """Bring back the request that waits longest."""
        if not self.waiting or len(self.running) >= MAX_REQUESTS:
            return False
        held = self.waiting[0]
        most = len_after_prefill(held.req) + self._window_of(held) + 2
        most = max(most, self._most_held(held.req) + 1)
        if self.pools.free() - self._reserved() < ceil_to_page(most, self.page_size):
            if self.running or self.pools.free() < self.pools.size:
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
        tokens = document[: self.rng.randint(1, len(document))]
        found = self.pools.tree.match_prefix(MatchPrefixParams(key=RadixKey(array.array("q", tokens))))
        slots = self.pools.tree.path_device_indices(found.last_device_node)[: found.device_prefix_len].long()
        expected = torch.tensor(self.pools.numbers(tokens[: len(slots)]), dtype=torch.int64)
        if len(slots) and not (self.pools.read(slots) == expected).all():
            raise Wrong("the tree has the KV of other tokens")
        return True

    def flush(self) -> bool:
        """Empty all, as a server that is idle can be asked to."""
        if self.running or self.waiting:
            return False
        self.check_all()
        self.pools.tree.reset()
        self.pools.rows.clear()
        self.pools.allocator.clear()
        return True

    def check_all(self) -> None:
        """Check all that must hold."""
        check_all(self.pools, self.running)
