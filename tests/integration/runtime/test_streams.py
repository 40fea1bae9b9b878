"""What must happen on the stream that computes: a CPU has one stream only, so here the streams are stand-ins."""

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.hooks import answers
from rkv_sglang.integration.runtime import runtime
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.requests import STATE_ATTRIBUTE, TRACE_ATTRIBUTE
from rkv_sglang.integration.runtime.runtime import Runtime
from rkv_sglang.sizes.lengths import RequestState


class Streams:
    """Remembers which stream is current, and that one waited for the other."""

    def __init__(self) -> None:
        self.current = "schedule"
        self.schedule_stream, self.forward_stream = object(), SimpleNamespace(wait_stream=self._wait)
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


def test_what_was_kept_is_read_for_a_trace_on_the_stream_that_computes_it(monkeypatch):
    streams = Streams()

    class KeptIndices:
        def cpu(self) -> np.ndarray:
            assert streams.current == "forward", "it may not have been computed yet"
            return np.arange(24).reshape(1, 1, 24)

    monkeypatch.setattr(
        runtime,
        "compact_requests",
        lambda *args, **kwargs: [SimpleNamespace(kept_indices=KeptIndices(), kept_scores=0)],
    )
    policy = Runtime(PolicyConfig(budget=24, buffer=16))
    scheduler: Any = SimpleNamespace(
        enable_overlap=True,
        forward_stream=streams.forward_stream,
        forward_stream_ctx=streams.forward_stream_ctx,
        schedule_stream=streams.schedule_stream,
        tree_cache=SimpleNamespace(free_kv_row=lambda kv, ranges: None),
        max_total_num_tokens=1000,
        token_to_kv_pool_allocator=SimpleNamespace(
            page_size=1, free_group_begin=lambda: None, free_group_end=lambda: None
        ),
    )
    query_window: Any = SimpleNamespace(flush=lambda: None, release=lambda row: None, row_bytes=0)
    buffers: Any = SimpleNamespace()
    policy.bind(Parts(scheduler=scheduler, buffers=buffers, query_window=query_window, metrics=None))
    kv = SimpleNamespace(req_pool_idx=0, kv_allocated_len=45, kv_committed_len=45, cache_protected_len=5)
    req = SimpleNamespace(rid="r", kv=kv, beam_group=None)
    setattr(req, STATE_ATTRIBUTE, RequestState(5, 300))
    setattr(req, TRACE_ATTRIBUTE, [])
    batch = SimpleNamespace(
        reqs=[req],
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(64).view(1, 64)),
        seq_lens=torch.tensor([45]),
        seq_lens_cpu=torch.tensor([45]),
    )
    policy._compact(batch, [0])
    assert streams.waited == [streams.schedule_stream] and streams.current == "schedule"
    assert [entry["resident_len"] for entry in getattr(req, TRACE_ATTRIBUTE)] == [40]
    assert kv.kv_allocated_len == 29 and batch.seq_lens.tolist() == [29]


def test_a_finished_request_keeps_no_tensors(monkeypatch):
    """A session keeps the requests of all its turns."""
    state = RequestState(5, 300, compactions=2, kept_scores=torch.zeros(3), prompt_hits=object(), host_copy=object())
    req = SimpleNamespace(rid="r", origin_input_ids=[1] * 5, output_ids=[2] * 90, finished=lambda: True)
    setattr(req, STATE_ATTRIBUTE, state)
    runs = SimpleNamespace(**req.__dict__)
    runs.finished = lambda: False
    running = RequestState(5, 300, kept_scores=torch.zeros(3))
    setattr(runs, STATE_ATTRIBUTE, running)
    monkeypatch.setattr(
        answers,
        "get_runtime",
        lambda: SimpleNamespace(config_of=lambda req: PolicyConfig()),
    )
    info = answers.streamer_class(object)().build_additional_customized_info([req, runs])
    assert info["kv_compactions"] == [[2], []]
    assert state.kept_scores is state.prompt_hits is state.host_copy is None
    assert running.kept_scores is not None
