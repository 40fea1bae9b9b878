"""SGLang's pools, allocator and radix tree with the policy's runtime on them, and no server, for the pool machine.

There is no model. What would be the KV of a token is a number of its own: of a token that full attention computed, the
number of all tokens up to it, so that equal prefixes hold equal numbers and may be shared; of one that was computed
over a compacted cache, a new one. Which numbers a request must hold is kept beside it, so a slot that was moved
wrongly, freed too early or written by somebody else shows.
"""

import array
import os
import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from rkv_census import census
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.mem_cache.allocation import alloc_for_decode_default, alloc_for_extend
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams

from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.query_window import QueryWindow
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.hooks import restore as hooks
from rkv_sglang.integration.runtime.current import set_runtime
from rkv_sglang.integration.runtime.parts import Parts, Scored
from rkv_sglang.integration.runtime.requests import CONFIG_ATTRIBUTE, state_of
from rkv_sglang.integration.runtime.restore import host_copy_of, len_after_prefill, restore_waiting
from rkv_sglang.integration.runtime.runtime import Runtime
from rkv_sglang.integration.startup.verify_switch import VERIFY_VARIABLE
from rkv_sglang.policies import ScoreInputs
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.query_rows import num_query_rows

NUM_KV_HEADS, NUM_QO_HEADS, HEAD_DIM = 2, 2, 3
MAX_REQUESTS = 5
# Few, so that prompts meet and answers repeat.
TOKENS = range(3, 6)
FIRST_FRESH = 2**22


class Wrong(AssertionError):
    """What must never happen, in one line."""


class PolicyReq(Req):
    """A request as SGLang's is once the hooks are applied; here nothing of SGLang is replaced."""

    def _compute_max_prefix_len(self, input_len: int) -> int:
        return hooks.match_prompt_only(Req._compute_max_prefix_len, self, input_len)

    def refresh_fill_ids(self) -> None:
        hooks.keep_resident_ids(Req.refresh_fill_ids, self)

    def reset_for_retract(self) -> None:
        hooks.after_retract(super().reset_for_retract(), self)


@dataclass
class Held:
    """A request and what it must hold.

    Attributes:
        numbers: Of every resident token, ``[num_layers * num_kv_heads, resident]``, int64.
        seen: Tokens seen, prompt and outputs whose KV is there, evicted ones included.
    """

    req: Any
    numbers: torch.Tensor
    seen: int
    compactions: int = 0


@dataclass
class CheckingPolicy:
    """Scores a token by a number in its key, and sees that the queries are those of the request's newest tokens."""

    world: "World"

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        window = len(inputs.queries)
        row = inputs.keys[0, 0, 2]
        newest = inputs.queries[:, 0, 0]
        logical_len = inputs.logical_len or len(inputs.keys)
        expected = torch.arange(logical_len - window, logical_len, dtype=torch.float32)
        if not torch.equal(newest, expected):
            raise Wrong(f"the window's queries are of positions {newest.tolist()}, not {expected.tolist()} ({row})")
        return inputs.keys[: len(inputs.keys) - window, :, 1].T.contiguous()


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
    steps: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        size = ceil_to_page(self.num_slots, self.page_size)
        self.rows = ReqToTokenPool(MAX_REQUESTS, 1024, "cpu", False)
        self.pool = MHATokenToKVPool(
            size, self.page_size, torch.float32, NUM_KV_HEADS, HEAD_DIM, self.num_layers, "cpu", False
        )
        if self.page_size == 1:
            self.allocator = TokenToKVPoolAllocator(size, torch.float32, "cpu", self.pool, False)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(size, self.page_size, torch.float32, "cpu", self.pool, False)
        self.tree = UnifiedRadixCache(
            CacheInitParams(
                disable=not self.radix,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=self.page_size,
                tree_components=(ComponentType.FULL,),
            )
        )
        ones = [1.0] * self.num_layers
        buffers = KVBuffers.from_layers(
            self.pool.k_buffer, self.pool.v_buffer, dtype=torch.float32, key_scales=ones, value_scales=ones
        )
        self.window = QueryWindow(
            num_layers=self.num_layers,
            num_rows=num_query_rows(self.config, size, MAX_REQUESTS),
            window=self.config.window,
            num_qo_heads=NUM_QO_HEADS,
            head_dim=HEAD_DIM,
            max_requests=MAX_REQUESTS + 1,
            dtype=torch.float32,
            device="cpu",
        )
        self.scheduler = SimpleNamespace(
            enable_overlap=False,
            forward_ct=0,
            max_total_num_tokens=size,
            metrics_reporter=SimpleNamespace(is_stats_logging_rank=False),
            page_size=self.page_size,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            attn_tp_group=SimpleNamespace(world_size=1),
            tree_cache=self.tree,
        )
        self.runtime = Runtime(self.config)
        self.runtime.policy = CheckingPolicy(self)
        os.environ[VERIFY_VARIABLE] = str(int(self.verify))
        scored = Scored(buffers=buffers, layers=(), query_window=self.window, first_layer=0)
        self.runtime.bind(Parts(scheduler=self.scheduler, scored=scored, metrics=None))  # type: ignore[arg-type]
        set_runtime(self.runtime)
        self.size = size
        self._number_of: dict[tuple[int, int], int] = {}
        self._last_fresh = FIRST_FRESH
        self._serial = 0
        self._compactions = 0
        self._documents = [[self.rng.choice(TOKENS) for _ in range(40)] for _ in range(3)]

    # Numbers that stand for KV.

    def _numbers(self, tokens: list[int]) -> list[int]:
        """Return the number of every prefix of ``tokens``."""
        numbers, last = [], 0
        for token in tokens:
            last = self._number_of.setdefault((last, token), len(self._number_of) + 1)
            numbers.append(last)
        return numbers

    def _write(self, slots: torch.Tensor, numbers: torch.Tensor) -> None:
        """Write tokens' numbers, and what they are scored by, into slots, all layers and heads."""
        rows = torch.zeros(len(slots), NUM_KV_HEADS, HEAD_DIM)
        rows[:, :, 0] = numbers.float().unsqueeze(1)
        for layer in range(self.num_layers):
            # Layers and heads differ, and so does what they keep.
            for head in range(NUM_KV_HEADS):
                rows[:, head, 1] = ((numbers * (7919 + 104729 * (2 * layer + head))) % 1_000_003).float()
            self.pool.k_buffer[layer][slots] = rows
            self.pool.v_buffer[layer][slots] = -rows

    def _read(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the numbers in slots, ``[num_layers * num_kv_heads, len(slots)]``."""
        found = torch.cat([layer[slots, :, 0].T for layer in self.pool.k_buffer])
        values = torch.cat([layer[slots, :, 0].T for layer in self.pool.v_buffer])
        if not torch.equal(found, -values):
            raise Wrong("keys and values of a token lie in different places")
        return found.long()

    def _slots(self, req: Any) -> torch.Tensor:
        return self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len].long()

    # Room.

    def _free(self) -> int:
        return int(self.allocator.available_size() + self.tree.evictable_size())

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
        return max(min(prompt_len + capacity, self.size - 1), prompt_len + config.capacity)

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
        if self._free() - self._reserved() < ceil_to_page(self._most_held(req) + 1, self.page_size):
            return False
        self._prefill(Held(req, torch.empty(0), 0))
        return True

    def _prefill(self, held: Held) -> None:
        """Give a request a row and slots, share what the tree has, compute or restore the rest."""
        req = held.req
        is_restored = host_copy_of(req) is not None
        req.init_next_round_input(self.tree)
        if req.prefix_len > len(req.origin_input_ids) and self.runtime.may_compact(req):
            raise Wrong(f"{req.rid} would share {req.prefix_len} tokens, more than its prompt")
        req.lock = self.tree.lock(req.last_node)
        req.extend_end = len(req.full_untruncated_fill_ids)
        batch = SimpleNamespace(
            reqs=[req],
            device="cpu",
            hisparse_coordinator=None,
            is_dllm=lambda: False,
            maybe_evict_swa=lambda: None,
            model_config=SimpleNamespace(is_encoder_decoder=False),
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
        )
        restore_waiting(batch)
        batch.prefix_lens, batch.extend_lens = [req.prefix_len], [req.extend_end - req.prefix_len]
        batch.seq_lens = batch.seq_lens_cpu = torch.tensor([req.extend_end])
        batch.extend_num_tokens = req.extend_end - req.prefix_len
        alloc_for_extend(batch)
        slots = self._slots(req)
        tokens = [*req.origin_input_ids, *req.output_ids]
        if is_restored:
            # All but the last token came from the copy.
            last = torch.full((len(held.numbers), 1), self._fresh())
            held.numbers = torch.cat([held.numbers[:, : req.extend_end - 1], last], dim=1)
            self._write(slots[-1:], last[0, :1])
        else:
            numbers = torch.tensor(self._numbers(tokens))
            self._write(slots[req.prefix_len :], numbers[req.prefix_len :])
            held.numbers = numbers.repeat(self.num_layers * NUM_KV_HEADS, 1)
        held.seen = len(tokens)
        checkpoint_kv_cache(req, self.tree)
        req.output_ids.append(self.rng.choice(TOKENS))
        self.running.append(held)
        self._check(held)

    def _fresh(self) -> int:
        self._last_fresh += 1
        return self._last_fresh

    def _batch(self, members: list[Held]) -> Any:
        lens = torch.tensor([held.req.kv.kv_allocated_len for held in members])
        indices = torch.tensor([held.req.kv.req_pool_idx for held in members])
        return SimpleNamespace(
            reqs=[held.req for held in members],
            device="cpu",
            batch_is_full=True,
            maybe_evict_swa=lambda: None,
            model_config=SimpleNamespace(is_encoder_decoder=False),
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
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
        self.scheduler.forward_ct += 1
        batch = self._batch(members)
        before = [held.req.kv.kv_allocated_len for held in members]
        self.runtime.before_decode(batch)
        for held, resident_len in zip(members, before, strict=True):
            if held.req.kv.kv_allocated_len != resident_len:
                self._note_compaction(held, resident_len)
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
            number = self._fresh() if state_of(req).evicted_tokens else self._numbers(tokens)[-1]
            numbers.append(number)
            slots.append(int(self.rows.req_to_token[req.kv.req_pool_idx, req.kv.kv_allocated_len - 1]))
            added = torch.full((len(held.numbers), 1), number)
            held.numbers = torch.cat([held.numbers, added], dim=1)
            held.seen += 1
        self._write(torch.tensor(slots), torch.tensor(numbers))
        self._capture(members)
        for held in members:
            if keep:
                held.req.output_ids.append(self.rng.choice(TOKENS))
        # The others have their turn when all are checked.
        self._check(self.rng.choice(members))

    def _capture(self, members: list[Held]) -> None:
        """Record queries that say at which position they were made."""
        if not self.window.active:
            return
        positions = torch.tensor([held.seen - 1 for held in members])
        queries = positions.float().view(-1, 1, 1).expand(-1, NUM_QO_HEADS, HEAD_DIM)
        indices = torch.tensor([held.req.kv.req_pool_idx for held in members])
        for layer in range(self.num_layers):
            self.window.capture(layer, queries, indices, positions)

    def _note_compaction(self, held: Held, resident_len: int) -> None:
        req, config = held.req, self.runtime.config_of(held.req)
        assert config is not None
        prompt_len = len(req.origin_input_ids)
        if req.kv.kv_allocated_len != prompt_len + config.budget or resident_len < prompt_len + config.budget + 1:
            raise Wrong(f"{req.rid} was compacted from {resident_len} to {req.kv.kv_allocated_len} tokens")
        found = self._read(self._slots(req))
        for row in range(len(found)):
            places = {number: place for place, number in enumerate(held.numbers[row].tolist())}
            kept = [places.get(number, -1) for number in found[row].tolist()]
            rest = kept[prompt_len:]
            newest = list(range(resident_len - config.window, resident_len))
            if kept[:prompt_len] != list(range(prompt_len)):
                raise Wrong(f"a compaction of {req.rid} changed its prompt")
            if rest != sorted(set(rest)) or min(rest) < prompt_len or rest[-config.window :] != newest:
                raise Wrong(f"{req.rid} kept the tokens {rest} of {resident_len}")
            best = ((held.numbers[row] * (7919 + 104729 * row)) % 1_000_003)[prompt_len : resident_len - config.window]
            top = best.topk(config.budget - config.window).indices.sort().values + prompt_len
            if rest[: -config.window] != top.tolist() and len(set(best.tolist())) == len(best):
                raise Wrong(f"{req.rid} kept {rest} and not its best, {top.tolist()}")
        held.numbers = found
        held.compactions += 1
        self._compactions += 1

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
        release_kv_cache(held.req, self.tree, checkpoint=checkpoint)
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
        release_kv_cache(req, self.tree, checkpoint=False)
        req.reset_for_retract()
        copy = host_copy_of(req)
        seen = len(req.origin_input_ids) + len(req.output_ids)
        if copy is not None:
            held.numbers = held.numbers[:, : copy.num_tokens]
            copied = torch.cat([layer[:, :, 0].T for layer in copy.keys])
            if not torch.equal(copied.long(), held.numbers):
                raise Wrong(f"the copy of {req.rid} is not what it held")
        if copy is None and ceil_to_page(seen + self._window_of(held) + 1, self.page_size) > self.size:
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
        if self._free() - self._reserved() < ceil_to_page(most, self.page_size):
            if self.running or self._free() < self.size:
                return False
            # Alone in an empty pool it has no room: a server would end it.
            self.waiting.pop(0)
            return True
        self.waiting.pop(0)
        self._prefill(held)
        return True

    def evict(self) -> bool:
        """Have the tree give up what nobody uses."""
        if not self.tree.evictable_size():
            return False
        self.tree.evict(EvictParams(num_tokens=self.rng.randint(1, 40)))
        return True

    def match(self) -> bool:
        """Look a document up; what is found must be what belongs there."""
        document = self.rng.choice(self._documents)
        tokens = document[: self.rng.randint(1, len(document))]
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array.array("q", tokens))))
        slots = self.tree.path_device_indices(found.last_device_node)[: found.device_prefix_len].long()
        expected = torch.tensor(self._numbers(tokens[: len(slots)]), dtype=torch.int64)
        if len(slots) and not (self._read(slots) == expected).all():
            raise Wrong("the tree has the KV of other tokens")
        return True

    def flush(self) -> bool:
        """Empty all, as a server that is idle can be asked to."""
        if self.running or self.waiting:
            return False
        self.check_all()
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()
        return True

    # What must hold.

    def _check(self, held: Held) -> None:
        req = held.req
        found = self._read(self._slots(req))
        if not torch.equal(found, held.numbers):
            places = (found != held.numbers).any(dim=0).nonzero().flatten().tolist()
            raise Wrong(f"{req.rid} holds other KV at {places[:9]} of {req.kv.kv_allocated_len}")
        config = self.runtime.config_of(req)
        assert config is not None
        private = req.kv.kv_allocated_len - len(req.origin_input_ids)
        if private > config.capacity and self.runtime.may_compact(req) and not req.retraction_count:
            raise Wrong(f"{req.rid} holds {private} generated tokens, and its capacity is {config.capacity}")

    def check_all(self) -> None:
        """Check every request, the tree, and who owns each page."""
        for held in self.running:
            self._check(held)
        tree_slots = self.tree.all_values_flatten().long()
        private = {}
        for held in self.running:
            kv = held.req.kv
            own = self._slots(held.req)[kv.cache_protected_len :]
            private[held.req.rid] = own[:: self.page_size] // self.page_size
        for kind, detail in census(self.allocator, tree_slots, private):
            raise Wrong(f"{kind}: {detail}")
        if self.rows.available_size() + len(self.running) != MAX_REQUESTS:
            raise Wrong("rows of the index map are lost")
        if not self.running and self._free() != self.size:
            raise Wrong(f"{self._free()} of {self.size} slots are free, and nobody runs")
