"""What a restore does where no real scheduler on a CPU gets to."""

import array
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rkv_sglang.cache.host_copy import HostCopy
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.hooks import metrics
from rkv_sglang.integration.hooks import restore as hooks
from rkv_sglang.integration.runtime import prefill_adder, restore
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.stats import PolicyStats
from rkv_sglang.sizes.lengths import RequestState

PROMPT_LEN, RESIDENT_LEN = 20, 50


def a_request(num_outputs: int, **fields: Any) -> SimpleNamespace:
    """Return a request that was compacted: of 100 tokens seen it holds 50."""
    state = RequestState(PROMPT_LEN, 300, evicted_tokens=50)
    return SimpleNamespace(
        rid="r",
        rkv_state=state,
        origin_input_ids=array.array("q", range(PROMPT_LEN)),
        output_ids=array.array("q", range(1000, 1000 + num_outputs)),
        sampling_params=SimpleNamespace(max_new_tokens=300),
        kv=SimpleNamespace(kv_allocated_len=RESIDENT_LEN, req_pool_idx=1),
        input_embeds=None,
        to_finish=None,
        finished=lambda: False,
        **fields,
    )


@pytest.fixture
def rowless():
    """Return the requests whose query rows were taken back."""
    return []


@pytest.fixture
def saved(monkeypatch, rowless):
    """Return how many tokens of each request were to be copied; the pool has 90 slots and the host no memory."""
    lengths: list[int] = []

    def save(runtime: object, req: object, saved_len: int) -> None:
        lengths.append(saved_len)

    runtime = SimpleNamespace(
        config=PolicyConfig(budget=24, buffer=16),
        config_of=lambda req: PolicyConfig(budget=24, buffer=16),
        looks_at_nothing=False,
        is_bound=True,
        forget_queries=rowless.append,
        page_size=1,
        parts=Parts(
            scheduler=SimpleNamespace(max_total_num_tokens=90, page_size=1),  # type: ignore[arg-type]
            scored=None,
            metrics=None,
        ),
        stats=PolicyStats(),
    )
    for module in (hooks, metrics, restore):
        monkeypatch.setattr(module, "get_runtime", lambda: runtime)
    monkeypatch.setattr(restore, "_save", save)
    return lengths


@pytest.mark.parametrize("num_outputs, saved_len", [(81, 50), (80, 49)], ids=["settled", "in flight"])
def test_the_token_in_flight_is_not_copied(saved, num_outputs, saved_len):
    req = a_request(num_outputs)
    hooks.copy_before_release(req=req, remaing_req_count=0)
    assert saved == [saved_len]
    # Nothing to come back to, so the request counts by all it has seen.
    assert restore.host_copy_of(req) is None
    assert restore.len_after_prefill(req) == PROMPT_LEN + num_outputs


def test_a_request_that_waits_for_its_copy_has_no_query_row(saved, rowless):
    req, fits = a_request(81), a_request(41)
    fits.rkv_state.evicted_tokens = 10
    for one in (req, fits):
        hooks.copy_before_release(req=one)
    assert rowless == [req]


def test_who_fits_neither_way_is_ended_and_not_queued(saved):
    hopeless, waits = a_request(81), a_request(41)
    for req in (hopeless, waits):
        req.return_logprob = False
    released, told, queued = [], [], []
    scheduler = restore.get_runtime().parts.scheduler
    scheduler._release_aborted_request = released.append
    scheduler.output_streamer = SimpleNamespace(stream_output=lambda reqs, logprob: told.extend(reqs))
    for req in (hopeless, waits):
        hooks.end_if_too_long(lambda scheduler, req, is_retracted: queued.append(req), scheduler, req, True)
    assert (released, told, queued) == ([hopeless], [hopeless], [waits])
    reason = hopeless.finished_reason.to_json()
    assert reason["status_code"] == 503 and "does not fit the KV pool of 90 tokens" in reason["message"]
    assert restore.get_runtime().stats.requests_aborted == 1


@pytest.mark.parametrize("is_saved_elsewhere", [True, False])
def test_ranks_keep_a_copy_only_where_all_of_them_have_one(monkeypatch, is_saved_elsewhere):
    def all_reduce(flag: torch.Tensor, op: object, group: object) -> None:
        assert (op, group) == (torch.distributed.ReduceOp.MIN, "the ranks")
        flag.mul_(is_saved_elsewhere)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    pool = SimpleNamespace(k_buffer=[torch.rand(60, 1, 2)], v_buffer=[torch.rand(60, 1, 2)])
    scheduler = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(120, dtype=torch.int32).view(2, 60) - 60),
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        attn_tp_group=SimpleNamespace(world_size=2),
        attn_tp_cpu_group="the ranks",
    )
    runtime = SimpleNamespace(parts=SimpleNamespace(scheduler=scheduler), on_forward_stream=contextlib.nullcontext)
    copy = restore._save(runtime, a_request(81), RESIDENT_LEN)
    assert (copy is not None) == is_saved_elsewhere
    assert copy is None or torch.equal(copy.keys[0], pool.k_buffer[0][:RESIDENT_LEN])


def test_what_is_left_as_it_was(saved):
    finished = a_request(81)
    finished.finished = lambda: True
    embedded = a_request(81)
    embedded.input_embeds = [[0.0]]
    never_compacted = a_request(31)
    never_compacted.rkv_state.evicted_tokens = 0
    fits = a_request(41)
    fits.rkv_state.evicted_tokens = 10
    for req in (finished, embedded, never_compacted, fits, SimpleNamespace()):
        hooks.copy_before_release(req=req)
    assert saved == []


def test_a_gateway_sees_a_request_that_waits_for_its_copy_as_what_it_kept(saved):
    copied, others = a_request(81), [a_request(41), SimpleNamespace()]
    copied.rkv_state.host_copy = HostCopy(*torch.zeros(2, 1, RESIDENT_LEN, 1, 1))
    copied.seqlen = PROMPT_LEN + 81
    loads = SimpleNamespace(num_total_tokens=300, num_active_tokens=280)
    metrics.count_what_was_kept(loads, SimpleNamespace(get_waiting_queue=lambda: [copied, *others]))
    assert (loads.num_total_tokens, loads.num_active_tokens) == (300 - 50, 280 - 50)


def test_a_request_that_waits_for_its_copy_counts_by_what_it_kept(saved, monkeypatch):
    req = a_request(81)
    req.rkv_state.host_copy = HostCopy(*torch.zeros(2, 1, RESIDENT_LEN, 1, 1))
    restore.use_resident_ids(req)
    hooks.keep_resident_ids(pytest.fail, req)
    assert list(req.full_untruncated_fill_ids) == [
        *range(PROMPT_LEN),
        *req.output_ids[-(RESIDENT_LEN + 1 - PROMPT_LEN) :],
    ]
    assert restore.len_after_prefill(req) == RESIDENT_LEN + 1
    # From 31 generated tokens up to its capacity of 40; computed again, it would need its window of 8.
    assert restore.growth_after_prefill(req, RESIDENT_LEN + 1, is_restored=True) == 9
    assert restore.growth_after_prefill(req, PROMPT_LEN + 81, is_restored=False) == 8
    monkeypatch.setattr(prefill_adder, "get_runtime", restore.get_runtime)
    assert prefill_adder.growth_of_waiting(req) == 9


@pytest.mark.parametrize("num_outputs", [79, 82])
def test_lengths_that_contradict_each_other_are_never_saved(saved, num_outputs):
    with pytest.raises(RuntimeError, match="please report this"):
        hooks.copy_before_release(req=a_request(num_outputs))
    assert saved == []


def test_a_seeded_sample_is_drawn_at_the_logical_position():
    """SGLang refuses deterministic inference on a CPU, so no server here can show it."""
    forward_batch = SimpleNamespace(seq_lens=torch.tensor([7, 51]), forward_mode=None)
    seen: list[list[int]] = []

    def sample(runner: object, logits_output: object, batch: Any) -> str:
        seen.append(batch.seq_lens.tolist())
        return "tokens"

    assert hooks.sample_at_logical_positions(sample, None, None, forward_batch) == "tokens"
    setattr(forward_batch, restore.EVICTED_ATTRIBUTE, torch.tensor([0, 50]))
    assert hooks.sample_at_logical_positions(sample, None, None, forward_batch) == "tokens"
    assert seen == [[7, 51], [7, 101]]
    assert forward_batch.seq_lens.tolist() == [7, 51]


@pytest.mark.parametrize("mrope", [None, torch.tensor([[0, 1, 1, 47, 3, 4], [0, 1, 2, 47, 3, 4], [0, 1, 3, 47, 3, 4]])])
def test_positions_of_restored_rows_only_count_what_was_evicted(mrope):
    reqs = [SimpleNamespace(), a_request(81), SimpleNamespace(rkv_state=RequestState(3, 9))]
    batch = SimpleNamespace(reqs=reqs, extend_lens=[3, 1, 2], seq_lens=torch.tensor([3, 51, 5]))
    forward_batch = SimpleNamespace(positions=torch.tensor([0, 1, 2, 50, 3, 4]), mrope_positions=mrope)
    restore.add_evicted_tokens(forward_batch, batch)
    assert forward_batch.positions.tolist() == [0, 1, 2, 100, 3, 4]
    if mrope is not None:
        assert (forward_batch.mrope_positions - mrope).tolist() == [[0, 0, 0, 50, 0, 0]] * 3
