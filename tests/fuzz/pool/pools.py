"""SGLang's pools, allocator and radix tree with the policy's runtime on them, and numbers in the place of KV."""

import os
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.query_window import QueryWindow
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.current import set_runtime
from rkv_sglang.integration.runtime.parts import Parts, Scored
from rkv_sglang.integration.runtime.runtime import Runtime
from rkv_sglang.integration.startup.verify_switch import VERIFY_VARIABLE
from rkv_sglang.policies import ScoreInputs
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.query_rows import num_query_rows
from tests.fuzz.pool.held import Wrong

NUM_KV_HEADS, NUM_QO_HEADS, HEAD_DIM = 2, 2, 3
MAX_REQUESTS = 5
MAX_TOKENS = 1024
FIRST_FRESH = 2**22


def rank_of(numbers: torch.Tensor, row: int) -> torch.Tensor:
    """Return what tokens score, by their numbers, in a row of layers and heads: these differ, and so what they keep."""
    return (numbers * (7919 + 104729 * row)) % 1_000_003


class CheckingPolicy:
    """Scores a token by a number in its key, and sees that the queries are those of the request's newest tokens."""

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        window = len(inputs.queries)
        row = inputs.keys[0, 0, 2]
        newest = inputs.queries[:, 0, 0]
        logical_len = inputs.logical_len or len(inputs.keys)
        expected = torch.arange(logical_len - window, logical_len, dtype=torch.float32)
        if not torch.equal(newest, expected):
            raise Wrong(f"the window's queries are of positions {newest.tolist()}, not {expected.tolist()} ({row})")
        return inputs.keys[: len(inputs.keys) - window, :, 1].T.contiguous()


class Pools:
    """All parts that the policy works on, and who writes and reads them as a model would."""

    def __init__(
        self, *, page_size: int, radix: bool, verify: bool, num_slots: int, num_layers: int, config: PolicyConfig
    ) -> None:
        """Build them, and make their runtime the one of this process."""
        self.page_size, self.num_layers = page_size, num_layers
        size = ceil_to_page(num_slots, page_size)
        self.rows = ReqToTokenPool(MAX_REQUESTS, MAX_TOKENS, "cpu", False)
        self.pool = MHATokenToKVPool(size, page_size, torch.float32, NUM_KV_HEADS, HEAD_DIM, num_layers, "cpu", False)
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(size, torch.float32, "cpu", self.pool, False)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(size, page_size, torch.float32, "cpu", self.pool, False)
        self.tree = UnifiedRadixCache(
            CacheInitParams(
                disable=not radix,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=page_size,
                tree_components=(ComponentType.FULL,),
            )
        )
        ones = [1.0] * num_layers
        buffers = KVBuffers.from_layers(
            self.pool.k_buffer, self.pool.v_buffer, dtype=torch.float32, key_scales=ones, value_scales=ones
        )
        self.runtime = Runtime(config)
        self.window: QueryWindow | None = None
        scored = None
        if not self.runtime.looks_at_nothing:
            self.runtime.policy = CheckingPolicy()
            self.window = QueryWindow(
                num_layers=num_layers,
                num_rows=num_query_rows(config, size, MAX_REQUESTS),
                window=config.window,
                num_qo_heads=NUM_QO_HEADS,
                head_dim=HEAD_DIM,
                max_requests=MAX_REQUESTS + 1,
                dtype=torch.float32,
                device="cpu",
            )
            scored = Scored(buffers=buffers, layers=(), query_window=self.window, first_layer=0)
        self.scheduler = SimpleNamespace(
            device="cpu",
            enable_overlap=False,
            forward_ct=0,
            max_total_num_tokens=size,
            metrics_reporter=SimpleNamespace(is_stats_logging_rank=False),
            page_size=page_size,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            attn_tp_group=SimpleNamespace(world_size=1),
            tree_cache=self.tree,
            # What is looked at before a prefix is made.
            chunked_req=None,
            model_config=SimpleNamespace(context_len=MAX_TOKENS),
            running_batch=SimpleNamespace(reqs=[]),
            waiting_queue=[],
            # Of those that wait for a prefix that is deleted: what it does to the tree, which knows nothing of them.
            _release_aborted_request=lambda req: None,
            output_streamer=SimpleNamespace(stream_output=lambda reqs, return_logprob: None),
        )
        os.environ[VERIFY_VARIABLE] = str(int(verify))
        self.runtime.bind(Parts(scheduler=self.scheduler, scored=scored, metrics=None))  # type: ignore[arg-type]
        set_runtime(self.runtime)
        self.size = size
        self._number_of: dict[tuple[int, int], int] = {}
        self._last_fresh = FIRST_FRESH

    def numbers(self, tokens: list[int], root: int = 0) -> list[int]:
        """Return the number of every prefix of ``tokens``, behind what ``root`` stands for."""
        numbers, last = [], root
        for token in tokens:
            last = self._number_of.setdefault((last, token), len(self._number_of) + 1)
            numbers.append(last)
        return numbers

    def fresh(self) -> int:
        """Return a number that no token has yet."""
        self._last_fresh += 1
        return self._last_fresh

    def write(self, slots: torch.Tensor, numbers: torch.Tensor) -> None:
        """Write tokens' numbers, and what they are scored by, into slots, all layers and heads."""
        rows = torch.zeros(len(slots), NUM_KV_HEADS, HEAD_DIM)
        rows[:, :, 0] = numbers.float().unsqueeze(1)
        for layer in range(self.num_layers):
            for head in range(NUM_KV_HEADS):
                rows[:, head, 1] = rank_of(numbers, NUM_KV_HEADS * layer + head).float()
            self.pool.k_buffer[layer][slots] = rows
            self.pool.v_buffer[layer][slots] = -rows

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the numbers in slots, ``[num_layers * num_kv_heads, len(slots)]``."""
        found = torch.cat([layer[slots, :, 0].T for layer in self.pool.k_buffer])
        values = torch.cat([layer[slots, :, 0].T for layer in self.pool.v_buffer])
        if not torch.equal(found, -values):
            raise Wrong("keys and values of a token lie in different places")
        return found.long()

    def capture(self, rows: list[int], positions: list[int]) -> None:
        """Record queries of a decode step that say at which position they were made."""
        if self.window is None or not self.window.active:
            return
        at = torch.tensor(positions)
        queries = at.float().view(-1, 1, 1).expand(-1, NUM_QO_HEADS, HEAD_DIM)
        for layer in range(self.num_layers):
            self.window.capture(layer, queries, torch.tensor(rows), at)

    def slots(self, req: Any) -> torch.Tensor:
        """Return the slots that a request holds, in order."""
        return self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len].long()

    def free(self) -> int:
        """Return the tokens there is room for, once the tree has given up what nobody uses."""
        return int(self.allocator.available_size() + self.tree.evictable_size())

    def batch(self, reqs: list[Any], **fields: Any) -> Any:
        """Return what stands for SGLang's batch of these requests."""
        return SimpleNamespace(
            reqs=reqs,
            device="cpu",
            maybe_evict_swa=lambda: None,
            model_config=SimpleNamespace(is_encoder_decoder=False),
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            **fields,
        )
