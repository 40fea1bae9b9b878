"""Compaction on a real-shaped pool: what moves, what must not, and what attention sees afterwards."""

import math
from dataclasses import dataclass

import pytest
import torch

from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import compact_request, move_kept
from rkv_sglang.cache.plan import plan_compaction
from rkv_sglang.config import PolicyConfig
from rkv_sglang.policies import make_policy
from rkv_sglang.policies.base import ScoreInputs

ROUNDS = range(6)


@dataclass(frozen=True)
class RecordingPolicy:
    """Random scores, kept for the test: what is chosen is not the point here, that it is carried out is."""

    scores: list[torch.Tensor]

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        self.scores.append(torch.rand(num_kv_heads, num_tokens - inputs.queries.shape[0]))
        return self.scores[-1]


def make_pool(num_layers: int, num_slots: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVBuffers:
    storage = torch.uint8 if dtype.itemsize == 1 else dtype
    keys = [torch.randn(num_slots, num_kv_heads, head_dim).to(dtype).view(storage) for _ in range(num_layers)]
    values = [torch.randn(num_slots, num_kv_heads, head_dim + 3).to(dtype).view(storage) for _ in range(num_layers)]
    return KVBuffers(keys, values, dtype, [1.0] * num_layers)


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One head: query [d], keys [n, d], values [n, dv]."""
    return (query @ keys.T / math.sqrt(len(query))).softmax(-1) @ values


@pytest.mark.parametrize("_round", ROUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_head_holds_its_own_kept_tokens_in_order_and_nothing_else_changes(_round, seed, rng, dtype):
    torch.manual_seed(seed)
    num_layers, num_kv_heads, group_size, head_dim = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 3), 8
    config = PolicyConfig(window=rng.randint(1, 4), budget=rng.randint(5, 12), buffer=rng.randint(1, 9))
    prompt_len = rng.randint(0, 20)
    resident_len = prompt_len + config.capacity
    buffers = make_pool(num_layers, 200, num_kv_heads, head_dim, dtype)
    # Slots in no order at all, as a long-running allocator hands them out; slot 0 is the engine's dummy.
    slots = 1 + torch.randperm(199)[:resident_len]
    before_keys = [k.clone() for k in buffers.keys]
    before_values = [v.clone() for v in buffers.values]
    policy = RecordingPolicy([])
    queries = torch.randn(num_layers, config.window, num_kv_heads * group_size, head_dim)
    plan = plan_compaction(prompt_len=prompt_len, resident_len=resident_len, budget=config.budget, page_size=1)

    compact_request(buffers, plan, slots, queries, policy, config)

    written = slots[prompt_len : plan.kept_len]
    untouched = torch.ones(200, dtype=torch.bool)
    untouched[written] = False
    for layer in range(num_layers):
        assert torch.equal(buffers.keys[layer][untouched], before_keys[layer][untouched])
        assert torch.equal(buffers.values[layer][untouched], before_values[layer][untouched])
        for head in range(num_kv_heads):
            candidates = policy.scores[layer][head, prompt_len:]
            top = candidates.topk(config.budget - config.window).indices.sort().values
            kept = torch.cat([top, torch.arange(config.capacity - config.window, config.capacity)])
            source = slots[prompt_len:][kept]
            assert torch.equal(buffers.keys[layer][written, head], before_keys[layer][source, head])
            assert torch.equal(buffers.values[layer][written, head], before_values[layer][source, head])


@pytest.mark.parametrize("_round", ROUNDS)
def test_attention_over_the_compacted_cache_is_attention_with_the_dropped_tokens_masked(_round, seed):
    torch.manual_seed(seed)
    config = PolicyConfig(window=3, budget=9, buffer=6)
    num_kv_heads, head_dim, prompt_len = 2, 16, 11
    resident_len = prompt_len + config.capacity
    buffers = make_pool(1, 64, num_kv_heads, head_dim, torch.float32)
    slots = 1 + torch.randperm(63)[:resident_len]
    keys, values = buffers.keys[0][slots].clone(), buffers.values[0][slots].clone()
    plan = plan_compaction(prompt_len=prompt_len, resident_len=resident_len, budget=config.budget, page_size=1)
    queries = torch.randn(1, config.window, 4, head_dim)
    policy = make_policy(config)
    compact_request(buffers, plan, slots, queries, policy, config)
    scores = policy.score(ScoreInputs(queries=queries[0], keys=keys, prompt_len=prompt_len))
    query = torch.randn(head_dim)
    for head in range(num_kv_heads):
        dropped = prompt_len + scores[head, prompt_len:].argsort(descending=True)[config.budget - config.window :]
        logits = query @ keys[:, head].T / math.sqrt(head_dim)
        logits[dropped] = -torch.inf
        expected = logits.softmax(-1) @ values[:, head]
        held = slots[: plan.kept_len]
        found = attention(query, buffers.keys[0][held, head], buffers.values[0][held, head])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_moving_reads_every_entry_before_it_is_overwritten():
    # Each head shifts everything by a different distance, so sources and targets overlap as much as they can.
    buffer = torch.arange(12.0)[:, None, None].repeat(1, 3, 1)
    slots = torch.arange(12)
    kept = torch.stack([torch.arange(shift, shift + 8) for shift in (0, 1, 4)])
    move_kept(buffer, slots, kept)
    for head, shift in enumerate((0, 1, 4)):
        assert buffer[:8, head, 0].tolist() == list(range(shift, shift + 8))
        assert buffer[8:, head, 0].tolist() == [8, 9, 10, 11]
