"""What is seen of those who judge a document, as a server shows it: layer by layer, in chunks, and perhaps again."""

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.config import BY_REPEAT, BY_TASK
from rkv_sglang.integration.runtime.prefixes.judging import DocumentAttention
from rkv_sglang.policies import GivenScores, SnapKV
from tests.support.oracle.judges import repeat_scores, task_scores
from tests.support.oracle.scores import ScoreInputs

NUM_LAYERS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, NUM_SLOTS, WINDOW = 2, 2, 2, 4, 400, 8
FP8 = torch.float8_e4m3fn


class Server:
    """A pool, the row of one request in the index map, and its forward passes."""

    def __init__(self, rng: random.Random, judge: str, dtype: torch.dtype) -> None:
        self.rng = rng
        self.length = rng.randint(12, 40)
        num_judging = self.length if judge == BY_REPEAT else rng.randint(1, 12)
        self.first = self.length + (rng.randint(0, 5) if judge == BY_REPEAT else 0)
        self.input_len = self.first + num_judging
        shape = (NUM_LAYERS, self.input_len, NUM_KV_HEADS, HEAD_DIM)
        self.keys = torch.randn(shape).to(dtype)
        self.queries = torch.randn(NUM_LAYERS, self.input_len, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM)
        self.scale = 0.5 if dtype == FP8 else 1.0
        # What was not written is no number.
        pool = [torch.full((NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM), torch.nan).to(dtype) for _ in range(NUM_LAYERS)]
        self.pool = [layer.view(torch.uint8) for layer in pool] if dtype == FP8 else pool
        scales = {"key_scales": [1.0] * NUM_LAYERS, "value_scales": [1.0] * NUM_LAYERS}
        buffers = KVBuffers.from_layers(self.pool, self.pool, dtype=dtype, **scales)
        scored: Any = SimpleNamespace(
            buffers=buffers,
            attention=PLAIN_ATTENTION,
            follow_scales=lambda: buffers.set_scales([self.scale] * NUM_LAYERS, [self.scale] * NUM_LAYERS),
        )
        self.req = SimpleNamespace(kv=SimpleNamespace(req_pool_idx=2))
        self.req_to_token = torch.zeros(5, 100, dtype=torch.int32)
        self.judging = DocumentAttention(
            judge, self.length, self.first, self.input_len, scored, self.req_to_token, self.req
        )

    def new_slots(self) -> None:
        """Give the request other slots, as after a preemption; the old ones are somebody else's now."""
        for layer in self.pool:
            layer[:] = torch.full((1,), torch.nan).to(self.keys.dtype).view(layer.dtype)
        self.req.kv.req_pool_idx = self.rng.randrange(5)
        self.slots = 1 + torch.randperm(NUM_SLOTS - 1)[: self.input_len]
        self.req_to_token[self.req.kv.req_pool_idx, : self.input_len] = self.slots

    def move(self, end: int) -> None:
        """Put what the row holds into other slots, as where the radix tree had the same tokens already."""
        free = sorted(set(range(1, NUM_SLOTS)) - set(self.slots.tolist()))
        others = torch.tensor(self.rng.sample(free, end))
        for layer in self.pool:
            layer[others] = layer[self.slots[:end]]
            layer[self.slots[:end]] = torch.full((1,), torch.nan).to(self.keys.dtype).view(layer.dtype)
        self.slots = torch.cat([others, self.slots[end:]])
        self.req_to_token[self.req.kv.req_pool_idx, : self.input_len] = self.slots

    def forward(self, place: int, end: int) -> None:
        """Run a chunk: every layer shows its queries and then writes its keys."""
        if place > 0 and self.rng.random() < 0.5:
            self.move(place)
        for layer in range(NUM_LAYERS):
            self.judging.see(layer, self.queries[layer, place:end], place)
            self.pool[layer][self.slots[place:end]] = self.keys[layer, place:end].view(self.pool[layer].dtype)

    def prefill(self, until: int) -> None:
        """Compute the prompt, some of the document found in the cache, up to a place."""
        self.new_slots()
        place = self.rng.randrange(self.length + 1)
        for layer in range(NUM_LAYERS):
            self.pool[layer][self.slots[:place]] = self.keys[layer, :place].view(self.pool[layer].dtype)
        while place < until:
            end = min(place + self.rng.choice([3, 10, 100]), until)
            self.forward(place, end)
            place = end


@pytest.mark.parametrize("_round", range(4))
@pytest.mark.parametrize("judge", [BY_TASK, BY_REPEAT])
def test_scores_are_the_oracles_whatever_chunks_hits_and_preemptions_there_were(_round, judge, seed, rng):
    torch.manual_seed(seed)
    server = Server(rng, judge, rng.choice([torch.float32, torch.bfloat16, FP8]))
    for _ in range(rng.choice([0, 1, 1, 2])):
        # It is preempted somewhere, and computed again.
        server.prefill(rng.randint(server.first + 1, server.input_len))
        assert not server.judging.is_complete
    server.prefill(server.input_len)
    assert not server.judging.is_complete
    server.judging.finish()
    assert server.judging.is_complete
    verdict = server.judging.verdict(SnapKV(), WINDOW)
    assert isinstance(verdict.policy, GivenScores)
    assert verdict.resident_len == server.length and verdict.queries.shape == (NUM_LAYERS, WINDOW, 0, 0)
    score = partial(task_scores if judge == BY_TASK else repeat_scores, length=server.length)
    start = server.length if judge == BY_TASK else server.first
    for layer in range(NUM_LAYERS):
        keys = server.keys[layer].float().transpose(0, 1) * server.scale
        queries = server.queries[layer, start:].transpose(0, 1)
        expected = score(ScoreInputs(keys, keys, queries, torch.empty(0), 0))
        torch.testing.assert_close(verdict.policy.scores[layer], expected, rtol=1e-4, atol=1e-6)


def test_a_layer_that_was_not_seen_is_missed(rng):
    server = Server(rng, BY_TASK, torch.float32)
    server.new_slots()
    server.judging.see(0, server.queries[0], 0)
    for layer in range(NUM_LAYERS):
        server.pool[layer][server.slots] = server.keys[layer]
    server.judging.finish()
    assert not server.judging.is_complete


def test_scores_that_are_there_take_the_place_of_a_policys(seed):
    torch.manual_seed(seed)
    scores = torch.randn(3, NUM_KV_HEADS, 20)
    inputs: Any = SimpleNamespace(keys=range(20), queries=range(WINDOW), layer=6)
    assert torch.equal(GivenScores(scores, first_layer=5).score(inputs), scores[1, :, :12])
