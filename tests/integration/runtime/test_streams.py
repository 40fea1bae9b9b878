"""What must happen on the stream that computes: a CPU has one stream only, so here the streams are stand-ins."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rkv_sglang import kernels
from rkv_sglang.cache.block_choice import BlockChoice
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.hooks import answers
from rkv_sglang.integration.runtime import drop, gather
from rkv_sglang.integration.runtime.parts import Parts, Scored
from rkv_sglang.integration.runtime.requests import STATE_ATTRIBUTE, TRACE_ATTRIBUTE
from rkv_sglang.integration.runtime.runtime import Runtime
from rkv_sglang.integration.runtime.stats import PolicyStats
from rkv_sglang.sizes.lengths import RequestState

KERNELS = str(Path(kernels.__file__).parent)


class Streams:
    """Remembers which stream is current, and that one waited for the other."""

    def __init__(self) -> None:
        self.current = "schedule"
        self.schedule_stream, self.forward_stream = (SimpleNamespace(wait_stream=self._wait) for _ in range(2))
        self.waited: list[object] = []

    def _wait(self, other: object) -> None:
        self.waited.append(other)

    @property
    def forward_stream_ctx(self) -> Any:
        return self._on_forward()

    @contextlib.contextmanager
    def _on_forward(self) -> Any:
        self.current = "forward"
        yield
        self.current = "schedule"


def a_step(streams: Streams, config: PolicyConfig) -> tuple[Runtime, Any, Any]:
    """Return a runtime whose scheduler has these streams, a request that is due and asks for a trace, and its batch."""
    policy = Runtime(config)
    scheduler: Any = SimpleNamespace(
        enable_overlap=True,
        forward_stream=streams.forward_stream,
        forward_stream_ctx=streams.forward_stream_ctx,
        schedule_stream=streams.schedule_stream,
        attn_tp_group=SimpleNamespace(world_size=1),
        tree_cache=SimpleNamespace(free_kv_row=lambda kv, ranges: None),
        max_total_num_tokens=1000,
        token_to_kv_pool_allocator=SimpleNamespace(
            page_size=1,
            free_group_begin=lambda: None,
            free_group_end=lambda: None,
            free_page_ids=lambda pages: None,
        ),
    )
    query_window: Any = SimpleNamespace(flush=lambda: None, release=lambda row: None, row_bytes=0)
    buffers: Any = SimpleNamespace(keys=SimpleNamespace(dtype=torch.float32))
    scored = Scored(buffers=buffers, layers=(), query_window=query_window, first_layer=0)
    policy.bind(Parts(scheduler=scheduler, scored=None if policy.looks_at_nothing else scored, metrics=None))
    kv = SimpleNamespace(req_pool_idx=0, kv_allocated_len=45, kv_committed_len=45, cache_protected_len=5)
    req = SimpleNamespace(rid="r", kv=kv, beam_group=None)
    setattr(req, STATE_ATTRIBUTE, RequestState(5, 300))
    setattr(req, TRACE_ATTRIBUTE, [])
    batch = SimpleNamespace(
        reqs=[req],
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(64, dtype=torch.int32).view(1, 64)),
        seq_lens=torch.tensor([45]),
        seq_lens_cpu=torch.tensor([45]),
        batch_is_full=True,
    )
    return policy, req, batch


def test_what_was_kept_is_read_for_a_trace_on_the_stream_that_computes_it(monkeypatch):
    streams = Streams()

    class KeptIndices:
        def cpu(self) -> np.ndarray:
            assert streams.current == "forward", "it may not have been computed yet"
            return np.arange(24).reshape(1, 1, 24)

    monkeypatch.setattr(
        gather,
        "compact_requests",
        lambda *args, **kwargs: [SimpleNamespace(kept_indices=KeptIndices(), kept_state=0, memory=None, observed=None)],
    )
    policy, req, batch = a_step(streams, PolicyConfig(budget=24, buffer=16))
    policy._compact(batch, [0])
    assert streams.waited == [streams.schedule_stream] and streams.current == "schedule"
    assert [entry["resident_len"] for entry in getattr(req, TRACE_ATTRIBUTE)] == [40]
    assert req.kv.kv_allocated_len == 29 and batch.seq_lens.tolist() == [29]


@pytest.mark.parametrize("policy_name", ["random", "keydiff"])
def test_a_row_is_rewritten_on_the_schedulers_stream_behind_the_scores_if_there_are_any(monkeypatch, policy_name):
    streams = Streams()
    config = PolicyConfig(policy=policy_name, granularity="request", budget=24, buffer=16, block=16)
    policy, req, batch = a_step(streams, config)
    rewrite = drop.drop_blocks

    def choose(*args: Any, **kwargs: Any) -> list[BlockChoice]:
        assert streams.current == "forward"
        return [BlockChoice(torch.tensor([], dtype=torch.int64), torch.tensor([1]))]

    def drop_blocks(*args: Any) -> Any:
        assert streams.current == "schedule"
        assert streams.waited == ([] if policy_name == "random" else [streams.schedule_stream, streams.forward_stream])
        return rewrite(*args)

    monkeypatch.setattr(drop, "choose_by_scores", choose)
    monkeypatch.setattr(drop, "drop_blocks", drop_blocks)
    policy._compact(batch, [0])
    row = batch.req_to_token_pool.req_to_token[0]
    assert row[:29].tolist() == [*range(16), *range(32, 45)]
    assert req.kv.kv_allocated_len == 29 and batch.seq_lens.tolist() == [29]
    assert [entry["resident_len"] for entry in getattr(req, TRACE_ATTRIBUTE)] == [40]


@pytest.mark.parametrize("more", range(16))
def test_who_is_due_again_within_a_window_keeps_its_query_row(monkeypatch, more):
    """Computed again, a request holds some tokens more than it has to, and up to a block of them stays."""
    config = PolicyConfig(policy="keydiff", granularity="request", budget=24, buffer=16, block=16)
    policy, req, batch = a_step(Streams(), config)
    released: list[int] = []
    policy.parts.scored.query_window.release = released.append
    req.kv.kv_allocated_len = req.kv.kv_committed_len = 45 + more

    def choose(buffers: Any, requests: Any, *args: Any, **kwargs: Any) -> list[BlockChoice]:
        blocks = torch.arange(requests[0].plan.first_block, requests[0].plan.end_block)
        return [BlockChoice(blocks[1:], blocks[:1])]

    monkeypatch.setattr(drop, "choose_by_scores", choose)
    policy._compact(batch, [0])
    assert req.kv.kv_allocated_len == 29 + more
    # The step that follows is the first of as many as are left until it is due.
    steps_left = 16 - more
    assert released == ([] if steps_left <= config.window else [0])


def test_a_choice_by_places_runs_no_kernel_and_touches_nothing_but_the_map():
    """Counted are calls of whatever reads or writes a pool or records queries, in the torch form that a CPU runs."""
    counts = {}
    for granularity in ("request", "head"):
        config = PolicyConfig(
            policy="random_attention",
            granularity=granularity,
            budget=24,
            buffer=16,
            block=16 if granularity == "request" else 1,
        )
        policy, req, batch = a_step(Streams(), config)
        if policy.parts.scored is not None:
            pools = [[torch.zeros(64, 1, 4)] for _ in range(2)]
            buffers = KVBuffers.from_layers(*pools, dtype=torch.float32, key_scales=[1.0], value_scales=[1.0])
            window: Any = policy.parts.scored.query_window
            window.read = lambda places, layers: torch.zeros(1, 1, 8, 1, 4)
            policy.bind(
                replace(policy.parts, scored=Scored(buffers=buffers, layers=(), query_window=window, first_layer=0))
            )
        called = set()

        def watch(frame: Any, event: str, argument: object, called: set[str] = called) -> None:
            path = frame.f_code.co_filename
            if event == "call" and path.startswith(KERNELS) and not path.endswith("transfer.py"):
                called.add(frame.f_code.co_name)

        sys.setprofile(watch)
        try:
            policy._compact(batch, [0])
        finally:
            sys.setprofile(None)
        counts[granularity] = called
        assert req.kv.kv_allocated_len == 29
        # Else nobody is admitted to what became free until somebody ends.
        assert not batch.batch_is_full
    assert counts["request"] == set()
    assert {"compact_paged", "move_kept_torch"} <= counts["head"]


def test_a_finished_request_keeps_no_tensors(monkeypatch):
    """A session keeps the requests of all its turns."""
    state = RequestState(5, 300, compactions=2, kept_state=torch.zeros(3), prompt_hits=object(), host_copy=object())
    req = SimpleNamespace(rid="r", origin_input_ids=[1] * 5, output_ids=[2] * 90, finished=lambda: True)
    req.extend_batch_idx, req.decode_batch_idx = 1, 89
    setattr(req, STATE_ATTRIBUTE, state)
    runs = SimpleNamespace(**req.__dict__)
    runs.finished = lambda: False
    running = RequestState(5, 300, kept_state=torch.zeros(3))
    setattr(runs, STATE_ATTRIBUTE, running)
    monkeypatch.setattr(
        answers,
        "get_runtime",
        lambda: SimpleNamespace(config_of=lambda req: PolicyConfig(), stats=PolicyStats()),
    )
    info = answers.streamer_class(object)().build_additional_customized_info([req, runs])
    assert info["kv_compactions"] == [[2], []]
    assert state.kept_state is state.prompt_hits is state.host_copy is None
    assert running.kept_state is not None
