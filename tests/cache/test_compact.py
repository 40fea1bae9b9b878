"""Compaction on a real-shaped pool: what moves, what must not, and what attention sees afterwards."""

import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.algorithm.thoughts import HELD, KEPT, KIND
from rkv_sglang.cache import compact
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest, compact_requests, split_layers, split_requests
from rkv_sglang.config import PolicyConfig
from rkv_sglang.kernels.paged_batch import PagedBuffers
from rkv_sglang.policies import make_policy
from rkv_sglang.policies.base import ScoreInputs
from rkv_sglang.sizes.compaction_plan import CompactionPlan, plan_compaction

ROUNDS = range(6)


@dataclass(frozen=True)
class RecordingPolicy:
    """Random scores, kept for the test: what is chosen is not the point here, that it is carried out is."""

    scores: list[torch.Tensor]

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        self.scores.append(torch.rand(num_kv_heads, num_tokens - inputs.queries.shape[0]))
        return self.scores[-1]


@dataclass(frozen=True)
class CountingPolicy:
    """Gives every token its logical position, plus 1000 for each compaction that it has seen; the oldest lose."""

    stateful: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        scores = torch.arange(num_tokens - inputs.queries.shape[0]) + float(inputs.evicted_tokens)
        scores = scores.repeat(num_kv_heads, 1)
        if inputs.state is not None:
            scores[:, inputs.prompt_len : inputs.prompt_len + inputs.num_scored] = inputs.state + 1000.0
        return scores


def make_pool(num_layers: int, num_slots: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVBuffers:
    storage = torch.uint8 if dtype.itemsize == 1 else dtype
    ones = [1.0] * num_layers
    keys = [torch.randn(num_slots, num_kv_heads, head_dim).to(dtype).view(storage) for _ in ones]
    values = [torch.randn(num_slots, num_kv_heads, head_dim + 3).to(dtype).view(storage) for _ in ones]
    return KVBuffers.from_layers(keys, values, dtype=dtype, key_scales=ones, value_scales=ones)


def layers_of(buffers: PagedBuffers) -> list[torch.Tensor]:
    """Each layer as ``[num_slots, num_kv_heads, head_dim]``."""
    return [tensor[:, 0] for tensor in buffers.tensors]


def due(plan: CompactionPlan, slots: torch.Tensor) -> DueRequest:
    return DueRequest(plan, slots, logical_len=plan.resident_len, wants_indices=True)


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One head: query [d], keys [n, d], values [n, dv]."""
    return (query @ keys.T / math.sqrt(len(query))).softmax(-1) @ values


@pytest.mark.parametrize("_round", ROUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_head_holds_its_own_kept_tokens_in_order_and_nothing_else_changes(_round, seed, rng, dtype, monkeypatch):
    torch.manual_seed(seed)
    # Alone, as on a CPU, or with others, as on a GPU; or in runs of layers, as a long one there.
    most_tokens = rng.choice([0, 15, 60, 1000])
    monkeypatch.setattr(compact, "most_tokens_together", lambda *_: most_tokens)
    num_layers, num_kv_heads, group_size, head_dim = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 3), 8
    window, num_requests = rng.randint(1, 4), rng.randint(1, 3)
    buffers = make_pool(num_layers, 200, num_kv_heads, head_dim, dtype)
    # Slots in no order at all, as a long-running allocator hands them out; slot 0 is the engine's dummy.
    free_slots = 1 + torch.randperm(199)
    requests = []
    for _ in range(num_requests):
        # Every request has a budget of its own.
        prompt_len, budget = rng.randint(0, 20), window + rng.randint(1, 9)
        resident_len = prompt_len + budget + rng.randint(1, 9)
        plan = plan_compaction(prompt_len=prompt_len, resident_len=resident_len, budget=budget, page_size=1)
        requests.append(due(plan, free_slots[:resident_len]))
        free_slots = free_slots[resident_len:]
    keys, values = layers_of(buffers.keys), layers_of(buffers.values)
    before_keys, before_values = [k.clone() for k in keys], [v.clone() for v in values]
    policy = RecordingPolicy([])
    queries = torch.randn(num_layers, num_requests, window, num_kv_heads * group_size, head_dim)

    compacted = compact_requests(buffers, requests, lambda part, layers: queries[layers, part], policy, window)

    assert [result.kept_state for result in compacted] == [None] * num_requests
    untouched = torch.ones(200, dtype=torch.bool)
    for request in requests:
        untouched[request.slots[request.plan.prompt_len : request.plan.kept_len]] = False
    scores = iter(policy.scores)
    for layer in range(num_layers):
        assert torch.equal(keys[layer][untouched], before_keys[layer][untouched])
        assert torch.equal(values[layer][untouched], before_values[layer][untouched])
    for request, result in zip(requests, compacted, strict=True):
        plan, private_slots = request.plan, request.slots[request.plan.prompt_len :]
        num_generated, budget = len(private_slots), plan.kept_len - plan.prompt_len
        written = private_slots[:budget]
        for layer in range(num_layers):
            layer_scores = next(scores)
            for head in range(num_kv_heads):
                top = layer_scores[head, plan.prompt_len :].topk(budget - window).indices.sort().values
                kept = torch.cat([top, torch.arange(num_generated - window, num_generated)])
                assert result.kept_indices[layer, head].tolist() == kept.tolist()
                source = private_slots[kept]
                assert torch.equal(keys[layer][written, head], before_keys[layer][source, head])
                assert torch.equal(values[layer][written, head], before_values[layer][source, head])


@pytest.mark.parametrize("_round", ROUNDS)
def test_attention_over_the_compacted_cache_is_attention_with_the_dropped_tokens_masked(_round, seed):
    torch.manual_seed(seed)
    config = PolicyConfig(window=3, budget=9, buffer=6)
    num_kv_heads, head_dim, prompt_len = 2, 16, 11
    resident_len = prompt_len + config.capacity
    buffers = make_pool(1, 64, num_kv_heads, head_dim, torch.float32)
    slots = 1 + torch.randperm(63)[:resident_len]
    (key_pool,), (value_pool,) = layers_of(buffers.keys), layers_of(buffers.values)
    keys, values = key_pool[slots].clone(), value_pool[slots].clone()
    plan = plan_compaction(prompt_len=prompt_len, resident_len=resident_len, budget=config.budget, page_size=1)
    queries = torch.randn(1, 1, config.window, 4, head_dim)
    policy = make_policy(config)
    compact_requests(buffers, [due(plan, slots)], lambda part, layers: queries[layers, part], policy, config.window)
    scores = policy.score(ScoreInputs(queries=queries[0, 0], keys=keys, prompt_len=prompt_len))
    query = torch.randn(head_dim)
    for head in range(num_kv_heads):
        dropped = prompt_len + scores[head, prompt_len:].argsort(descending=True)[config.budget - config.window :]
        logits = query @ keys[:, head].T / math.sqrt(head_dim)
        logits[dropped] = -torch.inf
        expected = logits.softmax(-1) @ values[:, head]
        held = slots[: plan.kept_len]
        found = attention(query, key_pool[held, head], value_pool[held, head])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def kept_state(*arguments) -> list[torch.Tensor | None]:
    return [result.kept_state for result in compact_requests(*arguments)]


@pytest.mark.parametrize("most_tokens", [0, 8])
def test_what_a_stateful_policy_scored_comes_back_with_the_tokens_that_it_kept(most_tokens, monkeypatch):
    monkeypatch.setattr(compact, "most_tokens_together", lambda *_: most_tokens)
    window, budget, num_kv_heads, prompt_len = 2, 6, 2, 3
    buffers = make_pool(2, 32, num_kv_heads, 4, torch.float32)
    slots, policy = torch.arange(1, 20), CountingPolicy()
    plan = plan_compaction(prompt_len=prompt_len, resident_len=13, budget=budget, page_size=1)

    def read_queries(part: slice, layers: slice) -> torch.Tensor:
        return torch.randn(2, 1, window, num_kv_heads, 4)[layers]

    (first,) = kept_state(buffers, [DueRequest(plan, slots[:13], 13)], read_queries, policy, window)
    # Of the generated tokens 3 to 12 the newest stay: 7 to 10 for their score, 11 and 12 as the window.
    assert first.tolist() == [[[7, 8, 9, 10]] * num_kv_heads] * 2
    plan = plan_compaction(prompt_len=prompt_len, resident_len=12, budget=budget, page_size=1)
    (second,) = kept_state(buffers, [DueRequest(plan, slots[:12], 16, first)], read_queries, policy, window)
    # Tokens scored before now outrank all others; there are as many as are kept.
    assert second.tolist() == [[[1007, 1008, 1009, 1010]] * num_kv_heads] * 2
    plan = plan_compaction(prompt_len=prompt_len, resident_len=12, budget=budget + 1, page_size=1)
    (third,) = kept_state(buffers, [DueRequest(plan, slots[:12], 19, second)], read_queries, policy, window)
    # One more is kept: the newest candidate, at logical position 16, which was never scored.
    assert third.tolist() == [[[2007, 2008, 2009, 2010, 16]] * num_kv_heads] * 2


@pytest.mark.parametrize("_round", ROUNDS)
def test_requests_are_taken_together_in_order_and_never_more_than_fit(_round, rng):
    kv_lens = [rng.randint(1, 50) for _ in range(rng.randint(0, 12))]
    most_tokens = rng.randint(0, 120)
    parts = [kv_lens[part] for part in split_requests(kv_lens, most_tokens)]
    assert [kv_len for part in parts for kv_len in part] == kv_lens
    assert all(part and (len(part) == 1 or len(part) * max(part) <= most_tokens) for part in parts)
    # No run would have taken in the next request too.
    assert all((len(a) + 1) * max(*a, b[0]) > most_tokens for a, b in itertools.pairwise(parts))


@pytest.mark.parametrize("_round", ROUNDS)
def test_layers_are_taken_together_in_order_and_never_more_than_fit(_round, rng):
    num_layers, num_tokens, most_tokens = rng.randint(1, 40), rng.randint(1, 5000), rng.randint(1, 5000)
    runs = [range(num_layers)[run] for run in split_layers(num_layers, num_tokens, most_tokens)]
    assert [layer for run in runs for layer in run] == list(range(num_layers))
    assert all(run and (len(run) == 1 or len(run) * num_tokens <= most_tokens * num_layers) for run in runs)
    assert len(runs) == 1 or (len(runs[0]) + 1) * num_tokens > most_tokens * num_layers
    assert list(split_layers(num_layers, num_tokens, 0)) == [slice(0, num_layers)]


def test_what_queries_take_counts_as_tokens(monkeypatch):
    """Room for two requests of 13 tokens: with queries worth 14 tokens each, every request is a run of its own."""
    most_tokens, plan = 26, plan_compaction(prompt_len=0, resident_len=13, budget=9, page_size=1)
    monkeypatch.setattr(compact, "most_tokens_together", lambda *_: most_tokens)
    buffers = make_pool(1, 60, 1, 4, torch.float32)
    token_bytes = compact.working_bytes_per_token(buffers.keys, 8)
    requests = [DueRequest(plan, torch.arange(13) + 13 * i, 13) for i in range(4)]
    runs = {}
    for worth in (0, 14):
        parts: list[slice] = []

        def read(part: slice, layers: slice, parts: list[slice] = parts) -> torch.Tensor:
            parts.append(part)
            return torch.randn(1, part.stop - part.start, 8, 1, 4)

        compact_requests(buffers, requests, read, RecordingPolicy([]), 8, query_bytes=worth * token_bytes)
        runs[worth] = [part.stop - part.start for part in parts]
    assert runs == {0: [2, 2], 14: [1, 1, 1, 1]}


def test_no_indices_stay_but_those_asked_for(monkeypatch):
    """Three parts of two requests, of which the third request is traced: nothing else outlives its part."""
    window, budget, plan = 2, 6, plan_compaction(prompt_len=0, resident_len=13, budget=6, page_size=1)
    monkeypatch.setattr(compact, "most_tokens_together", lambda *_: 26)
    buffers, of_parts, living = make_pool(2, 90, 2, 4, torch.float32), [], []

    def compact_and_watch(*arguments: object) -> object:
        living.append(sum(indices() is not None for indices in of_parts))
        kept = compact_paged(*arguments)
        of_parts.append(weakref.ref(kept.indices))
        return kept

    compact_paged = compact.compact_paged
    monkeypatch.setattr(compact, "compact_paged", compact_and_watch)
    requests = [DueRequest(plan, torch.arange(13) + 13 * i, 13, wants_indices=i == 2) for i in range(6)]
    queries = torch.randn(2, 6, window, 2, 4)
    results = compact_requests(
        buffers, requests, lambda part, layers: queries[layers, part], RecordingPolicy([]), window
    )
    # The part before is let go of when the next one's are there.
    assert len(of_parts) == 3 and max(living) <= 1
    assert sum(indices() is not None for indices in of_parts) == 0
    held = [result.kept_indices for result in results]
    assert [indices is not None for indices in held] == [False, False, True, False, False, False]
    # Its own and no more: not a view of what belongs to others.
    assert held[2].shape == (2, 2, budget) and held[2].untyped_storage().nbytes() == 2 * 2 * budget * 4


@dataclass(frozen=True)
class ObservingPolicy:
    """Counts its compactions in what it observes, and sums up the keys of the layers that it asked for."""

    seen: list[tuple[int, list[float]]]

    def observed_layers(self, layers: Sequence[int]) -> list[int]:
        return [layers[-1], layers[0]]

    def observe(self, of_layers: Iterator[ScoreInputs]) -> torch.Tensor:
        layers = list(of_layers)
        count = 0.0 if layers[0].observed is None else layers[0].observed[0] + 1
        return torch.tensor([count, *(own.keys.sum() for own in layers), *(float(own.layer) for own in layers)])

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        self.seen.append((inputs.layer, inputs.observed.tolist()))
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        return torch.zeros(num_kv_heads, num_tokens - len(inputs.queries))


@pytest.mark.parametrize("sliding", [frozenset(), frozenset({5})], ids=["all attend", "the last does not"])
def test_what_is_observed_once_is_given_to_every_layer_and_at_the_next_compaction(seed, sliding, monkeypatch):
    torch.manual_seed(seed)
    # Runs of a layer or two.
    monkeypatch.setattr(compact, "most_tokens_together", lambda *_: 30)
    buffers = make_pool(3, 60, 2, 8, torch.float32)
    buffers = KVBuffers(replace(buffers.keys, first_layer=3), replace(buffers.values, first_layer=3))
    plan = plan_compaction(prompt_len=2, resident_len=20, budget=9, page_size=1)
    requests = [DueRequest(plan, 1 + 20 * i + torch.arange(20), 20) for i in range(2)]
    queries, model = torch.randn(3, 2, 4, 4, 8), ModelAttention(sliding_layers=sliding)
    observed_layers = [4, 3] if sliding else [5, 3]
    for count in range(3):
        policy = ObservingPolicy([])
        sums = [
            [float(layers_of(buffers.keys)[layer - 3][own.slots].sum()) for layer in observed_layers]
            for own in requests
        ]
        compacted = compact_requests(buffers, requests, lambda part, own: queries[own, part], policy, 4, model=model)
        expected = [[float(count), *own, *map(float, observed_layers)] for own in sums]
        for own, result in zip(expected, compacted, strict=True):
            torch.testing.assert_close(result.observed, torch.tensor(own), rtol=1e-4, atol=1e-4)
        given = [(layer, result.observed.tolist()) for result in compacted for layer in (3, 4, 5)]
        assert sorted(policy.seen) == sorted(given)
        requests = [replace(own, observed=result.observed) for own, result in zip(requests, compacted, strict=True)]


def test_thoughts_of_a_request_do_not_depend_on_its_neighbours(seed):
    """Two requests that are compacted together, four times, keep what each keeps alone; all heads as many a segment."""
    torch.manual_seed(seed)
    parameters = {"buffer": 12, "negligible": 0.3, "execution_up_to": 0.45, "transition_above": 0.55}
    policy = make_policy(PolicyConfig(policy="thinkv", parameters=parameters))
    plan = plan_compaction(prompt_len=3, resident_len=43, budget=28, page_size=1)
    tokens = torch.randn(2, 5, 40, 4, 2, 8)
    queries = 2 * torch.randn(5, 4, 2, 4, 4, 8)

    def run(numbers: list[int]) -> list[torch.Tensor]:
        buffers = make_pool(4, 90, 2, 8, torch.float32)
        observed, kept = [None] * len(numbers), []
        for step in range(5):
            requests = []
            for i, number in enumerate(numbers):
                slots = 1 + 43 * i + torch.arange(43)
                # All is new at first, and what the buffer holds later.
                first = 0 if step == 0 else 28
                for layer, keys in enumerate(layers_of(buffers.keys)):
                    keys[slots[3 + first :]] = tokens[number, step, first:, layer]
                    keys[slots[:3]] = 0.5
                requests.append(DueRequest(plan, slots, 43 + 12 * step, wants_indices=True, observed=observed[i]))
            own = queries[step][:, numbers]
            results = compact_requests(buffers, requests, lambda part, layers, own=own: own[layers, part], policy, 4)
            observed = [result.observed for result in results]
            kept.append([(result.kept_indices, result.observed) for result in results])
        return kept

    together, alone = run([0, 1]), [run([0]), run([1])]
    kinds = set()
    for step, both in enumerate(together):
        for number, (indices, table) in enumerate(both):
            assert torch.equal(indices, alone[number][step][0][0]) and torch.equal(table, alone[number][step][0][1])
            ends = table[HELD].cumsum(0)
            segments = torch.searchsorted(ends, indices[:, :, :24].contiguous().long(), right=True)
            counts = torch.nn.functional.one_hot(segments, len(ends)).sum(dim=2)
            assert (counts == table[KEPT]).all() and int(table[KEPT].sum()) == 24
            kinds |= set(table[KIND].tolist())
    assert len(kinds) >= 2
