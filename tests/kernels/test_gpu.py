"""On a GPU: every kernel against its oracle at served sizes, CUDA graphs, no sync, no late compilation, memory.

With ``RKV_REHEARSE=1`` they run at tiny sizes on a CPU, in Triton's interpreter (``benchmarks.common.device``).
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.common.device import DEVICE, REHEARSAL, captured, no_wait, peak_extra_bytes
from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.algorithm.scoring import rkv_scores
from rkv_sglang.algorithm.selection import select_kept
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest, compact_requests
from rkv_sglang.cache.query_window import QueryWindow
from rkv_sglang.cache.step_tensors import read_slots, subtract_evicted
from rkv_sglang.config import PolicyConfig
from rkv_sglang.kernels import capture, move, select
from rkv_sglang.kernels.api import compact_paged_kv
from rkv_sglang.kernels.capture import capture_queries, capture_queries_torch
from rkv_sglang.kernels.dispatch import choose_kept_torch, compact_paged, working_bytes_per_token
from rkv_sglang.kernels.move import move_kept_paged, move_kept_torch
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score import key_passes, totals
from rkv_sglang.kernels.score.attention import rkv_scores_paged
from rkv_sglang.kernels.select import select_kept_paged
from rkv_sglang.kernels.warmup import warm_up
from rkv_sglang.policies import POLICIES, RKV, Policy, make_policy
from rkv_sglang.sizes.compaction_plan import plan_compaction
from tests.kernels.test_api import GPU_ATTENTIONS, check_attention
from tests.policies.cases import model_with_statistics

pytestmark = pytest.mark.gpu

NUM_LAYERS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, WINDOW = (2, 1, 2, 32, 8) if REHEARSAL else (4, 8, 4, 128, 8)
BUDGET, BUFFER = (32, 8) if REHEARSAL else (1024, 128)
LONGEST_PROMPT = BUDGET // 5
SETTINGS: dict[str, Any] = {"mix_lambda": 0.1, "kernel_size": 7, "similarity_threshold": 0.5}
HEAD_DIMS = [32, 80] if REHEARSAL else [64, 80, 128, 256]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
# How far a score may be from its oracle, as a part of its size: fp32 sums in another order, softmax of them.
TOLERANCE = 1e-3


def make_side(num_slots: int, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> list[torch.Tensor]:
    """Keys in clusters, as trained models have them, so that near-duplicates exist but not everywhere."""
    layers = []
    for _ in range(NUM_LAYERS):
        centres = torch.randn(32, NUM_KV_HEADS, head_dim, device=DEVICE)
        near = centres[torch.randint(32, (num_slots,), device=DEVICE)]
        layers.append((near + 0.6 * torch.randn_like(near)).to(dtype))
    return layers


class Case:
    """A pool and a ragged batch of requests in it, one that is just due and some that are longer."""

    def __init__(self, seed: int, dtype: torch.dtype, num_requests: int = 3, head_dim: int = HEAD_DIM) -> None:
        torch.manual_seed(seed)
        rng = random.Random(seed)
        self.prompt_lens = [rng.randint(0, LONGEST_PROMPT) for _ in range(num_requests)]
        self.budgets = [rng.choice([BUDGET, BUDGET - 3, BUDGET // 3]) for _ in range(num_requests)]
        self.kv_lens = [p + b + rng.randint(1, BUFFER) for p, b in zip(self.prompt_lens, self.budgets, strict=True)]
        num_slots = sum(self.kv_lens) + 100
        self.slots = 1 + torch.randperm(num_slots - 1, device=DEVICE)[: sum(self.kv_lens)]
        scales = [0.5 + 0.1 * layer for layer in range(NUM_LAYERS)] if dtype.itemsize == 1 else [1.0] * NUM_LAYERS
        self.buffers = KVBuffers.from_layers(
            make_side(num_slots, dtype, head_dim),
            make_side(num_slots, dtype, head_dim),
            dtype=dtype,
            key_scales=scales,
            value_scales=scales,
        )
        lens = {"kv_lens": self.kv_lens, "prompt_lens": self.prompt_lens, "budgets": self.budgets}
        self.batch = PagedBatch.from_slots(self.slots, **lens, window=WINDOW)
        query_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
        shape = (NUM_LAYERS, num_requests, WINDOW, NUM_KV_HEADS * GROUP_SIZE, head_dim)
        self.queries = torch.randn(shape, device=DEVICE).to(query_dtype)

    def expected_scores(self, layer: int, request: int) -> torch.Tensor:
        keys = self.buffers.keys
        raw = keys.tensors[layer][self.slots.split(self.kv_lens)[request], 0]
        dequantised = raw.view(keys.dtype).float() * keys.scales[layer]
        return rkv_scores(self.queries[layer, request], dequantised, **SETTINGS)


def some_model() -> ModelAttention:
    """Rotary positions, and statistics of queries on the device, for the policies that ask for them."""
    model = model_with_statistics(NUM_LAYERS, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM)
    assert model.statistics is not None
    on_device = QueryStatistics(model.statistics.means.to(DEVICE), model.statistics.mean_lengths.to(DEVICE))
    return replace(model, statistics=on_device)


def copy_of(buffers: PagedBuffers) -> PagedBuffers:
    return PagedBuffers.from_tensors([tensor.clone() for tensor in buffers.tensors], dtype=buffers.dtype)


def equal_bytes(one: PagedBuffers, other: PagedBuffers) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one.tensors, other.tensors, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scores_and_the_choice_are_those_of_the_oracle(seed, dtype, head_dim):
    case = Case(seed, dtype, head_dim=head_dim)
    scores = rkv_scores_paged(case.buffers.keys, case.batch, case.queries, **SETTINGS)
    kept = select_kept_paged(scores, case.batch)
    starts = case.batch.token_indptr.tolist()
    for layer in range(NUM_LAYERS):
        for request, (prompt_len, budget) in enumerate(zip(case.prompt_lens, case.budgets, strict=True)):
            found = scores[layer, :, starts[request] : starts[request + 1] - WINDOW]
            expected = case.expected_scores(layer, request)
            # A pair whose cosine is the threshold up to rounding moves a mean by 1 / L: rare, and no error.
            far = (found - expected).abs() > TOLERANCE * expected.abs()
            assert far.float().mean() < 0.01
            own = kept[layer, request]
            assert torch.equal(own[:, :budget].long(), select_kept(found, prompt_len, WINDOW, budget))
            assert (own[:, budget:] == -1).all()
            best = select_kept(expected, prompt_len, WINDOW, budget)
            for head in range(NUM_KV_HEADS):
                least = expected[head, prompt_len + best[head, : budget - WINDOW]].min()
                chosen = expected[head, prompt_len + own[head, : budget - WINDOW].long()]
                assert (chosen >= least - 2 * TOLERANCE * least.abs()).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_what_a_prompt_found_within_itself_gives_the_scores_of_a_whole_scan(seed, dtype):
    case = Case(seed, dtype)
    whole = rkv_scores_paged(case.buffers.keys, case.batch, case.queries, **SETTINGS)
    hits = [PromptHits.empty(NUM_LAYERS, NUM_KV_HEADS, n, whole.device) for n in case.prompt_lens]
    for _ in range(2):
        scores = rkv_scores_paged(case.buffers.keys, case.batch, case.queries, **SETTINGS, prompt_hits=hits)
        # A pair whose cosine is the threshold up to rounding may be found in one and not in the other.
        assert ((scores - whole).abs() > TOLERANCE * whole.abs()).float().mean() < 0.01
        for own in hits:
            own.is_filled = True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(POLICIES))
def test_every_policy_chooses_as_in_torch(seed, name, dtype):
    case = Case(seed, dtype)
    policy = make_policy(PolicyConfig(policy=name))
    keys, values = case.buffers.keys, case.buffers.values
    model = some_model()
    expected = choose_kept_torch(keys, values, case.batch, case.queries, policy, model=model).indices
    kept = compact_paged(keys, values, case.batch, case.queries, policy, model=model).indices
    # Products in another order move a score by its last bits, so the last one kept may change places with the next.
    shared = [
        len(set(mine) & set(its)) / len(set(its))
        for mine, its in zip(kept.flatten(0, 2).tolist(), expected.flatten(0, 2).tolist(), strict=True)
    ]
    assert min(shared) > 0.97 and sum(shared) / len(shared) > 0.999


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_what_moves_is_what_moves_in_torch_every_time(seed, dtype, head_dim):
    case = Case(seed, dtype, head_dim=head_dim)
    keys, values = case.buffers.keys, case.buffers.values
    for _ in range(10):
        # Random scores, so that heads keep other tokens each time and sources overlap targets in every way.
        kept = select_kept_paged(torch.rand(NUM_LAYERS, NUM_KV_HEADS, sum(case.kv_lens), device=DEVICE), case.batch)
        expected_keys, expected_values = copy_of(keys), copy_of(values)
        move_kept_torch(expected_keys, expected_values, case.batch, kept)
        move_kept_paged(keys, values, case.batch, kept)
        assert equal_bytes(keys, expected_keys) and equal_bytes(values, expected_values)


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_compaction_repeats_itself_to_the_byte(seed, name):
    policy = make_policy(PolicyConfig(policy=name))
    case = Case(seed, torch.bfloat16)
    twin = copy_of(case.buffers.keys), copy_of(case.buffers.values)
    model = some_model()
    first = compact_paged(case.buffers.keys, case.buffers.values, case.batch, case.queries, policy, model=model)
    second = compact_paged(*twin, case.batch, case.queries, policy, model=model)
    assert torch.equal(first.indices, second.indices)
    assert equal_bytes(case.buffers.keys, twin[0]) and equal_bytes(case.buffers.values, twin[1])


@pytest.mark.parametrize("paged_attention", GPU_ATTENTIONS.values(), ids=GPU_ATTENTIONS)
@pytest.mark.parametrize("page_size", [1, 16])
def test_attention_over_pages_compacted_on_the_gpu_is_attention_with_the_dropped_tokens_masked(
    seed, page_size, paged_attention
):
    check_attention(seed, page_size, paged_attention, DEVICE)


def served(seed: int, num_requests: int) -> tuple[KVBuffers, QueryWindow, Callable[[Policy], None]]:
    """A pool, a query window with rows for its requests, and the call that a server makes when they are due."""
    case = Case(seed, torch.bfloat16, num_requests)
    window = QueryWindow(
        num_layers=NUM_LAYERS,
        num_rows=num_requests,
        window=WINDOW,
        num_qo_heads=NUM_KV_HEADS * GROUP_SIZE,
        head_dim=HEAD_DIM,
        max_requests=num_requests + 1,
        dtype=torch.bfloat16,
        device=DEVICE,
    )
    window.rings.copy_(torch.randn_like(window.rings))
    for request in range(num_requests):
        window.acquire(request + 1, object(), lambda *_: True)
    window.flush()
    requests, places = [], []
    for index, own in enumerate(case.slots.split(case.kv_lens)):
        plan = plan_compaction(
            prompt_len=case.prompt_lens[index],
            resident_len=case.kv_lens[index],
            budget=case.budgets[index],
            page_size=1,
        )
        requests.append(DueRequest(plan, own, len(own) + 7))
        places.append((index + 1, len(own) + 7))

    model = some_model()

    def read_queries(part: slice, layers: slice) -> torch.Tensor:
        return window.read(places[part], layers)

    def compact(policy: Policy) -> None:
        compact_requests(case.buffers, requests, read_queries, policy, WINDOW, model=model)

    return case.buffers, window, compact


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_compaction_waits_for_nothing_on_the_gpu(seed, name):
    policy = make_policy(PolicyConfig(policy=name))
    _, _, compact = served(seed, 5)
    compact(policy)
    with no_wait():
        compact(policy)


def test_a_steps_bookkeeping_waits_for_nothing_on_the_gpu(seed, rng):
    torch.manual_seed(seed)
    req_to_token = torch.randint(1, 2**31 - 1, (9, 300), dtype=torch.int32, device=DEVICE)
    rows, lengths = rng.sample(range(9), 5), [rng.randint(1, 300) for _ in range(5)]
    seq_lens_cpu = torch.tensor(lengths)
    seq_lens = seq_lens_cpu.to(DEVICE)
    read_slots(req_to_token, rows, lengths)
    with no_wait():
        found = read_slots(req_to_token, rows, lengths)
        shorter, shorter_cpu = subtract_evicted(seq_lens, seq_lens_cpu, [0, 1, 0, 0, 1])
    for own, row, length in zip(found, rows, lengths, strict=True):
        assert own.dtype == torch.int64 and torch.equal(own, req_to_token[row, :length].long())
    assert shorter.tolist() == shorter_cpu.tolist() == [n - e for n, e in zip(lengths, [0, 1, 0, 0, 1], strict=True)]


def test_the_api_waits_for_nothing_on_the_gpu_if_the_lengths_are_on_the_cpu(seed):
    torch.manual_seed(seed)
    cache = [tuple(torch.randn(2, 40, 16, NUM_KV_HEADS, HEAD_DIM, device=DEVICE).bfloat16()) for _ in range(NUM_LAYERS)]
    # The second of three requests is not due.
    table = (
        torch.tensor([0, 12, 14, 30], dtype=torch.int32),
        torch.randperm(40, device=DEVICE)[:30].int(),
        torch.tensor([3, 16, 9], dtype=torch.int32),
    )
    queries = torch.randn(NUM_LAYERS, 3, WINDOW, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM, device=DEVICE).bfloat16()
    compact_paged_kv(cache, *table, [20, 5, 0], queries, budget=64)
    with no_wait():
        compact_paged_kv(cache, *table, [20, 5, 0], queries, budget=64)


@pytest.mark.skipif(REHEARSAL, reason="the interpreter compiles nothing")
def test_nothing_is_compiled_after_the_warm_up(seed):
    kernels = [
        value
        for module in (capture, move, key_passes, totals, select)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "device_caches")
    ]
    assert len(kernels) >= 6
    buffers, window, _ = served(seed, 1)
    device = torch.cuda.current_device()
    for kernel in kernels:
        kernel.device_caches.clear()
    warm_up(
        buffers.keys,
        buffers.values,
        window.rings,
        window.row_of_request,
        RKV(),
        budget=BUDGET,
        capacity=BUDGET + BUFFER,
    )
    compiled = [len(kernel.device_caches[device][0]) for kernel in kernels]
    assert all(compiled)
    for num_requests in (1, 2, 3, 7, 16):
        _, _, compact = served(seed + num_requests, num_requests)
        compact(RKV())
    for batch_size in (1, 5, 16):
        queries = torch.randn(batch_size, NUM_KV_HEADS * GROUP_SIZE * HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        # A view that starts anywhere, as a part of a larger tensor may.
        indices = torch.zeros(batch_size + 1, dtype=torch.int64, device=DEVICE)[1:]
        for layer in range(len(window.rings)):
            window.capture(layer, queries, indices, indices)
    assert [len(kernel.device_caches[device][0]) for kernel in kernels] == compiled


def test_a_compaction_holds_no_more_memory_than_is_accounted_for(seed):
    case = Case(seed, torch.bfloat16, num_requests=8)
    compact_paged(case.buffers.keys, case.buffers.values, case.batch, case.queries, RKV())
    held = peak_extra_bytes(
        lambda: compact_paged(case.buffers.keys, case.buffers.values, case.batch, case.queries, RKV())
    )
    assert held <= working_bytes_per_token(case.buffers.keys, WINDOW) * sum(case.kv_lens) * 1.05


@pytest.mark.parametrize("graph_batch_size", [1, 8, 64])
def test_captured_queries_are_those_of_eager_steps_whatever_the_batch(seed, rng, graph_batch_size):
    torch.manual_seed(seed)
    num_qo_heads, num_rows, max_requests = NUM_KV_HEADS * GROUP_SIZE, 5, 80
    shape = (NUM_LAYERS, num_rows + 1, WINDOW, num_qo_heads, HEAD_DIM)
    rings = torch.full(shape, torch.nan, device=DEVICE, dtype=torch.bfloat16)
    expected = rings.clone()
    row_of_request = torch.zeros(max_requests, dtype=torch.int64, device=DEVICE)
    # The inputs of the graph, as a server has them: written before each replay, padded with index 0.
    queries = torch.zeros(NUM_LAYERS, graph_batch_size, num_qo_heads * HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    indices = torch.zeros(graph_batch_size, dtype=torch.int64, device=DEVICE)
    positions = torch.zeros(graph_batch_size, dtype=torch.int64, device=DEVICE)

    def step() -> None:
        capture_queries(rings, row_of_request, list(queries), indices, positions)

    replay = captured(step)
    for _ in range(30):
        batch_size = rng.randint(1, graph_batch_size)
        # Rows change hands between steps.
        owners = rng.sample(range(1, max_requests), num_rows)
        row_of_request.zero_()
        row_of_request[owners] = 1 + torch.randperm(num_rows, device=DEVICE)
        running = rng.sample(range(1, max_requests), batch_size)
        queries.copy_(torch.randn(queries.shape, device=DEVICE))
        indices.copy_(torch.tensor(running + [0] * (graph_batch_size - batch_size)))
        positions.copy_(torch.randint(100_000, (graph_batch_size,)))
        replay()
        own = slice(batch_size)
        capture_queries_torch(expected, row_of_request, list(queries[:, own]), indices[own], positions[own])
        torch.testing.assert_close(rings[:, 1:], expected[:, 1:], rtol=0, atol=0, equal_nan=True)
