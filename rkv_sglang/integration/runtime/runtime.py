"""The policy inside one scheduler process: before every decode step it compacts what is due in the running batch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import Compacted, DueRequest, compact_requests
from rkv_sglang.cache.query_window import QueryWindow
from rkv_sglang.cache.trace import pack_compaction
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.metrics import PolicyMetrics, metrics_for
from rkv_sglang.integration.runtime.requests import (
    SETTINGS_ATTRIBUTE,
    STATE_ATTRIBUTE,
    TRACE_ATTRIBUTE,
    known_state_of,
    settings_for,
    wants_trace,
)
from rkv_sglang.integration.runtime.stats import PolicyStats
from rkv_sglang.integration.startup.memory_report import report_memory
from rkv_sglang.kernels.warmup import warm_up
from rkv_sglang.policies import make_policy
from rkv_sglang.sizes.compaction_plan import CompactionPlan, plan_compaction
from rkv_sglang.sizes.lengths import NEVER, RequestState, can_ever_compact, decodes_again, steps_until_due
from rkv_sglang.sizes.query_rows import num_query_rows

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner


class Runtime:
    """One per scheduler process, made before the scheduler is built and bound to its parts as they appear."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self.policy = make_policy(config)
        self.stats = PolicyStats()
        self.metrics: PolicyMetrics | None = None
        self.scheduler: Scheduler | None = None
        self.buffers: KVBuffers | None = None
        self.window: QueryWindow | None = None
        self._first_layer = 0

    def bind_model_runner(self, model_runner: ModelRunner) -> None:
        """Take the KV pool and allocate the query window, before CUDA graphs are captured."""
        from sglang.srt.layers.radix_attention import RadixAttention

        layers = [module for module in model_runner.model.modules() if isinstance(module, RadixAttention)]
        pool: Any = model_runner.token_to_kv_pool
        self._first_layer = pool.start_layer
        layers.sort(key=lambda layer: layer.layer_id)
        self.buffers = KVBuffers.from_layers(
            pool.k_buffer,
            pool.v_buffer,
            dtype=pool.dtype,
            key_scales=[layer.k_scale_float or 1.0 for layer in layers],
            value_scales=[layer.v_scale_float or 1.0 for layer in layers],
        )
        num_requests = model_runner.req_to_token_pool.req_to_token.shape[0]
        self.window = QueryWindow(
            num_layers=len(layers),
            num_rows=num_query_rows(self.config, pool.size, num_requests - 1),
            window=self.config.window,
            num_qo_heads=layers[0].tp_q_head_num,
            head_dim=layers[0].qk_head_dim,
            max_requests=num_requests,
            dtype=model_runner.dtype,
            device=model_runner.device,
        )
        warm_up(
            self.buffers.keys,
            self.buffers.values,
            self.window.buffer,
            self.window.row_of_request,
            self.policy,
            budget=self.config.budget,
            capacity=self.config.capacity,
        )

    def bind_scheduler(self, scheduler: Scheduler) -> None:
        """Take the scheduler once it is built, and say what was set up."""
        self.scheduler = scheduler
        assert self.window is not None
        side_bytes = self.window.num_bytes
        self.metrics = metrics_for(scheduler, side_bytes=side_bytes)
        report_memory(scheduler, self.config, side_bytes=side_bytes, num_query_rows=self.window.buffer.shape[1] - 1)

    def capture_queries(self, layer_id: int, queries: torch.Tensor, forward_batch: Any) -> None:
        """Record one decode step's queries of one layer (called within the forward pass, so within CUDA graphs)."""
        window = self.window
        if window is not None and (window.always_capture or window.active):
            window.capture(
                layer_id - self._first_layer, queries, forward_batch.req_pool_indices, forward_batch.positions
            )

    def state_of(self, req: Req) -> RequestState:
        """Return the request's state, made at the first look, which is after SGLang has set its length limit."""
        state = known_state_of(req)
        if state is None:
            state = RequestState(len(req.origin_input_ids), int(req.sampling_params.max_new_tokens))
            setattr(req, STATE_ATTRIBUTE, state)
        return state

    def read_settings(self, req: Req) -> None:
        """Take what the request asks of the policy; call once, before anything else looks at it.

        Raises:
            ValueError: It asks for what cannot be; one line.
        """
        assert self.scheduler is not None
        asked = req.sampling_params.custom_params
        settings = settings_for(asked, self.config, self.scheduler.max_total_num_tokens)
        setattr(req, SETTINGS_ATTRIBUTE, settings)
        if wants_trace(asked, self.config):
            setattr(req, TRACE_ATTRIBUTE, [])

    def settings_of(self, req: Req) -> PolicyConfig | None:
        """Return what bounds the request's KV; None if nothing does, as for a beam."""
        if req.beam_group is not None:
            return None
        settings: PolicyConfig | None = getattr(req, SETTINGS_ATTRIBUTE, self.config)
        return settings

    def trace_of(self, req: Req) -> list[dict[str, Any]] | None:
        """Return the compactions of a request that asked for a trace, as ``pack_compaction`` makes them; else None."""
        return getattr(req, TRACE_ATTRIBUTE, None)

    def _bound(self, req: Req) -> PolicyConfig:
        settings = self.settings_of(req)
        assert settings is not None, "only requests with a policy are compacted"
        return settings

    def may_compact(self, req: Req) -> bool:
        """Return whether the request's length limit lets it reach a compaction at all."""
        config = self.settings_of(req)
        return config is not None and can_ever_compact(config, self.state_of(req).max_new_tokens)

    def before_decode(self, batch: ScheduleBatch) -> None:
        """Compact what is due in the running batch. Idempotent between two decode steps.

        Runs on the scheduler's thread before admission, so freed slots are there for waiting requests, and while the
        forward pass in flight has already been counted in every length. Mutates the KV pool, the requests' lengths,
        the allocator and ``batch.seq_lens``; never ``orig_seq_lens``, which stays logical, nor ``req_to_token``.
        """
        assert self.scheduler is not None and self.window is not None
        forward_ct = self.scheduler.forward_ct
        due = [
            i
            for i, req in enumerate(batch.reqs)
            if (state := known_state_of(req)) is None or state.next_check <= forward_ct
        ]
        if due:
            due = [i for i in due if self._is_due(batch.reqs[i], forward_ct)]
            if due:
                self._compact(batch, due)
            else:
                with self.on_forward_stream():
                    self.window.flush()

    def _is_due(self, req: Req, forward_ct: int) -> bool:
        """Decide for one request; see that it has a query row in time; set when to look again."""
        assert self.window is not None
        state, config = self.state_of(req), self.settings_of(req)
        if req.finished() or not req.kv.holds_kv:
            return False
        resident_len = req.kv.kv_allocated_len
        if config is None or not self.may_compact(req) or not decodes_again(state, resident_len):
            state.next_check = NEVER
            return False
        remaining = steps_until_due(config, state.prompt_len, resident_len, req.decode_batch_idx)
        if remaining > self.config.window:
            state.next_check = forward_ct + remaining - self.config.window
            return False
        if not self.window.has_row(req.kv.req_pool_idx, req):
            self.window.acquire(req.kv.req_pool_idx, req, _runs_under)
        state.next_check = forward_ct + remaining
        return remaining == 0

    def _compact(self, batch: ScheduleBatch, due: list[int]) -> None:
        assert self.scheduler is not None and self.window is not None and self.buffers is not None
        jobs: list[tuple[Req, CompactionPlan, torch.Tensor]] = []
        evicted = [0] * len(batch.reqs)
        for i in due:
            req = batch.reqs[i]
            plan = self._plan(req)
            # Under overlap the scheduler may rewrite the map before the device gets to the move, so the slots are
            # copied now, on the scheduler's stream.
            slots = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : plan.resident_len].to(torch.int64)
            jobs.append((req, plan, slots))
            evicted[i] = plan.evicted_tokens
        timed = self.metrics.timed() if self.metrics is not None else contextlib.nullcontext()
        with self.on_forward_stream() as stream, timed:
            self.window.flush()
            requests, places = [], []
            for req, plan, slots in jobs:
                if stream is not None and slots.is_cuda:
                    slots.record_stream(stream)
                state = self.state_of(req)
                requests.append(DueRequest(plan, slots, state.logical_len(plan.resident_len), state.kept_scores))
                places.append((req.kv.req_pool_idx, requests[-1].logical_len))
            window = self.window
            results = compact_requests(
                self.buffers,
                requests,
                lambda part: window.read(places[part]),
                self.policy,
                self.config.window,
                query_bytes=window.row_bytes,
            )
            for (req, plan, _), result in zip(jobs, results, strict=True):
                self._record(req, plan, result)
        for (req, plan, _), result in zip(jobs, results, strict=True):
            self.state_of(req).kept_scores = result.kept_scores
            self._shrink(req, plan)
        if self.metrics is not None:
            self.metrics.count(self.stats)
        evicted_cpu = torch.tensor(evicted, dtype=batch.seq_lens_cpu.dtype, pin_memory=batch.seq_lens.is_cuda)
        # New tensors: results still in flight hold the old ones.
        batch.seq_lens = batch.seq_lens - evicted_cpu.to(batch.seq_lens, non_blocking=True)
        batch.seq_lens_cpu = batch.seq_lens_cpu - evicted_cpu
        batch.seq_lens_sum = None
        # SGLang opens admission again only when a request leaves the batch; here room appears without that.
        batch.batch_is_full = False

    def _plan(self, req: Req) -> CompactionPlan:
        assert self.scheduler is not None
        state, kv = self.state_of(req), req.kv
        if kv.cache_protected_len > state.prompt_len or kv.kv_committed_len != kv.kv_allocated_len:
            raise RuntimeError(
                f"request {req.rid}: the radix tree owns {kv.cache_protected_len} tokens of a prompt of "
                f"{state.prompt_len}, {kv.kv_committed_len} of {kv.kv_allocated_len} slots are committed; compacting "
                "would write shared slots. Please report this with the server's flags"
            )
        return plan_compaction(
            prompt_len=state.prompt_len,
            resident_len=kv.kv_allocated_len,
            budget=self._bound(req).budget,
            page_size=self.scheduler.token_to_kv_pool_allocator.page_size,
        )

    def _record(self, req: Req, plan: CompactionPlan, result: Compacted) -> None:
        trace = self.trace_of(req)
        if trace is not None:
            # Waits for the current stream, which must be the one that fills the indices; only who asks for it pays.
            trace.append(
                pack_compaction(
                    result.kept_indices.cpu(),
                    resident_len=plan.resident_len - plan.prompt_len,
                    evicted_before=self.state_of(req).evicted_tokens,
                )
            )

    def _shrink(self, req: Req, plan: CompactionPlan) -> None:
        """Free the pages past what is kept and shorten the request's lengths."""
        assert self.scheduler is not None and self.window is not None
        kv = req.kv
        # From here on tokens and slots no longer match, so the tree must not take this request's tail.
        req.skip_radix_cache_insert = True
        if plan.freed_start < plan.freed_end:
            self.scheduler.tree_cache.free_kv_row(kv, [(plan.freed_start, plan.freed_end)])
        kv.kv_allocated_len = kv.kv_committed_len = plan.kept_len
        if self._bound(req).buffer > self.config.window:
            self.window.release(kv.req_pool_idx)
        self.stats.count(plan, self.state_of(req))

    def on_retract(self, req: Req) -> None:
        """Forget what was cached, unless it comes back; keep recomputed KV of generated tokens out of the tree."""
        state = self.state_of(req)
        if state.host_copy is None:
            state.forget_cache()
        state.next_check = 0
        if len(req.output_ids) > 0 and self.may_compact(req):
            req.skip_radix_cache_insert = True

    def on_forward_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Enter the stream on which forward passes run, behind what the scheduler's stream has done so far."""
        scheduler = self.scheduler
        assert scheduler is not None
        if not scheduler.enable_overlap:
            return contextlib.nullcontext()
        scheduler.forward_stream.wait_stream(scheduler.schedule_stream)
        return _enter(scheduler.forward_stream_ctx, scheduler.forward_stream)


@contextlib.contextmanager
def _enter(context: Any, stream: Any) -> Any:
    with context:
        yield stream


def _runs_under(req_pool_idx: int, owner: Any) -> bool:
    """Tell whether a request still holds that row of ``req_to_token``."""
    return bool(owner.kv.req_pool_idx == req_pool_idx)
