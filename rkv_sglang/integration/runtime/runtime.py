"""The policy inside one scheduler process: before every decode step it compacts what is due in the running batch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rkv_sglang.cache.compact import Compacted, DueRequest, compact_requests
from rkv_sglang.cache.prompt_hits import PromptHitsRoom
from rkv_sglang.cache.step_tensors import read_slots, subtract_evicted
from rkv_sglang.cache.trace import pack_compaction
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.metrics import metrics_for
from rkv_sglang.integration.runtime.parts import ModelParts, Parts, model_parts
from rkv_sglang.integration.runtime.requests import (
    CONFIG_ATTRIBUTE,
    TRACE_ATTRIBUTE,
    config_for,
    head_start_of,
    known_state_of,
    state_of,
    trace_of,
    wants_trace,
)
from rkv_sglang.integration.runtime.stats import PolicyStats
from rkv_sglang.integration.startup.memory_report import report_memory
from rkv_sglang.policies import keeps_prompt_hits, make_policy
from rkv_sglang.sizes.compaction_plan import CompactionPlan, plan_compaction
from rkv_sglang.sizes.lengths import NEVER, RequestState, can_ever_compact, decodes_again, steps_until_due
from rkv_sglang.sizes.stagger import most_head_start

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request to compact in this step.

    Attributes:
        slots: Of every resident token, temporal order, ``[plan.resident_len]``, int64; a copy.
    """

    req: Req
    state: RequestState
    config: PolicyConfig
    plan: CompactionPlan
    slots: torch.Tensor


class Runtime:
    """One per scheduler process, made before the scheduler is built and bound to its parts as they appear."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self.policy = make_policy(config)
        self.stats = PolicyStats()
        self.prompt_hits_room = PromptHitsRoom(is_used=keeps_prompt_hits(self.policy))
        self._model_parts: ModelParts | None = None
        self._parts: Parts | None = None

    @property
    def is_bound(self) -> bool:
        """Whether the scheduler is built."""
        return self._parts is not None

    @property
    def parts(self) -> Parts:
        """The parts of the built scheduler.

        Raises:
            RuntimeError: It is not built yet.
        """
        if self._parts is None:
            raise RuntimeError("the KV policy was asked for its scheduler before there was one; please report this")
        return self._parts

    def bind_model_runner(self, model_runner: ModelRunner) -> None:
        """Take the KV pool and allocate the query window, before CUDA graphs are captured."""
        self._model_parts = model_parts(model_runner, self.config, self.policy)

    def bind_scheduler(self, scheduler: Scheduler) -> None:
        """Take the scheduler once it is built, and say what was set up."""
        model = self._model_parts
        if model is None:
            raise RuntimeError("SGLang built a scheduler without a KV pool; please report this with the server's flags")
        query_window = model.query_window
        metrics = metrics_for(scheduler, side_bytes=query_window.num_bytes)
        self.bind(Parts(scheduler=scheduler, buffers=model.buffers, query_window=query_window, metrics=metrics))
        report_memory(scheduler, self.config, side_bytes=query_window.num_bytes, num_query_rows=query_window.num_rows)

    def bind(self, parts: Parts) -> None:
        """Take the parts, once."""
        self._parts = parts

    def record_queries(self, layer_id: int, queries: torch.Tensor, forward_batch: Any) -> None:
        """Record one decode step's queries of one layer (called within the forward pass, so within CUDA graphs)."""
        model = self._model_parts
        if model is not None and (model.query_window.always_capture or model.query_window.active):
            model.query_window.capture(
                layer_id - model.first_layer, queries, forward_batch.req_pool_indices, forward_batch.positions
            )

    def read_request(self, req: Req) -> None:
        """Take what the request asks of the policy; call once, before anything else looks at it.

        Raises:
            ValueError: It asks for what cannot be; one line.
        """
        asked = req.sampling_params.custom_params
        config = config_for(asked, self.config, self.parts.scheduler.max_total_num_tokens)
        setattr(req, CONFIG_ATTRIBUTE, config)
        if wants_trace(asked, self.config):
            setattr(req, TRACE_ATTRIBUTE, [])

    def config_of(self, req: Req) -> PolicyConfig | None:
        """Return what bounds the request's KV; None if nothing does, as for a beam."""
        if req.beam_group is not None:
            return None
        config: PolicyConfig | None = getattr(req, CONFIG_ATTRIBUTE, self.config)
        return config

    def may_compact(self, req: Req) -> bool:
        """Return whether the request's length limit lets it reach a compaction at all."""
        config = self.config_of(req)
        return config is not None and can_ever_compact(config, state_of(req).max_new_tokens)

    def before_decode(self, batch: ScheduleBatch) -> None:
        """Compact what is due in the running batch. Idempotent between two decode steps.

        Runs on the scheduler's thread before admission, so freed slots are there for waiting requests, and while the
        forward pass in flight has already been counted in every length. Mutates the KV pool, the requests' lengths,
        the allocator and ``batch.seq_lens``; never ``orig_seq_lens``, which stays logical, nor ``req_to_token``.
        """
        forward_ct = self.parts.scheduler.forward_ct
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
                    self.parts.query_window.flush()

    def _is_due(self, req: Req, forward_ct: int) -> bool:
        """Decide for one request; see that it has a query row in time; set when to look again."""
        state, config = state_of(req), self.config_of(req)
        if req.finished() or not req.kv.holds_kv:
            return False
        resident_len = req.kv.kv_allocated_len
        if config is None or not self.may_compact(req) or not decodes_again(state, resident_len):
            state.next_check = NEVER
            return False
        head_start = head_start_of(req, config)
        earliest = most_head_start(config) if head_start is None else head_start
        remaining = steps_until_due(config, state.prompt_len, resident_len, req.decode_batch_idx, earliest)
        if head_start is None:
            remaining = max(remaining, 1)
        if remaining > self.config.window:
            state.next_check = forward_ct + remaining - self.config.window
            return False
        query_window = self.parts.query_window
        if not query_window.has_row(req.kv.req_pool_idx, req):
            query_window.acquire(req.kv.req_pool_idx, req, _runs_under)
        state.next_check = forward_ct + remaining
        return remaining == 0

    def _compact(self, batch: ScheduleBatch, due: list[int]) -> None:
        """Compact the requests of ``batch.reqs`` whose indices are in ``due``, and bring every length up to it."""
        buffers, query_window, metrics = self.parts.buffers, self.parts.query_window, self.parts.metrics
        jobs = self._jobs(batch, [batch.reqs[i] for i in due])
        pool_size = self.parts.scheduler.max_total_num_tokens
        with self.on_forward_stream() as stream, metrics.timed() if metrics is not None else contextlib.nullcontext():
            query_window.flush()
            requests, places = [], []
            # All slots are views of one tensor.
            if stream is not None and jobs[0].slots.is_cuda:
                jobs[0].slots.record_stream(stream)
            for job in jobs:
                logical_len = job.state.logical_len(job.plan.resident_len)
                hits = self.prompt_hits_room.hits_of(
                    job.state, buffers, capacity=job.config.capacity, most_tokens=pool_size
                )
                wants = trace_of(job.req) is not None
                requests.append(DueRequest(job.plan, job.slots, logical_len, job.state.kept_scores, hits, wants))
                places.append((job.req.kv.req_pool_idx, logical_len))
            results = compact_requests(
                buffers,
                requests,
                lambda part, layers: query_window.read(places[part], layers),
                self.policy,
                self.config.window,
                query_bytes=query_window.row_bytes,
            )
            for job, result in zip(jobs, results, strict=True):
                _trace(job, result)
        allocator = self.parts.scheduler.token_to_kv_pool_allocator
        # Each free by itself would copy the allocator's whole list of free slots.
        allocator.free_group_begin()
        for job, result in zip(jobs, results, strict=True):
            job.state.kept_scores = result.kept_scores
            self._shrink(job)
        allocator.free_group_end()
        if metrics is not None:
            metrics.count(self.stats)
        evicted = [0] * len(batch.reqs)
        for i, job in zip(due, jobs, strict=True):
            evicted[i] = job.plan.evicted_tokens
        batch.seq_lens, batch.seq_lens_cpu = subtract_evicted(batch.seq_lens, batch.seq_lens_cpu, evicted)
        batch.seq_lens_sum = None
        # Scheduler._get_new_batch_prefill_raw sets it where nothing fits, and SGLang clears it only when a request
        # leaves the batch; here room appears without that.
        batch.batch_is_full = False

    def _jobs(self, batch: ScheduleBatch, reqs: list[Req]) -> list[Job]:
        """Plan the compaction of some requests of the batch; nothing is changed."""
        plans = [self._plan(req) for req in reqs]
        # Under overlap the scheduler may rewrite the map before the device gets to the move, so the slots are copied
        # now, on the scheduler's stream.
        slots = read_slots(
            batch.req_to_token_pool.req_to_token,
            [req.kv.req_pool_idx for req in reqs],
            [plan.resident_len for _, plan in plans],
        )
        return [
            Job(req=req, state=state_of(req), config=config, plan=plan, slots=own)
            for req, (config, plan), own in zip(reqs, plans, slots, strict=True)
        ]

    def _plan(self, req: Req) -> tuple[PolicyConfig, CompactionPlan]:
        """Plan one request's compaction by its settings, which are returned too."""
        state, config, kv = state_of(req), self.config_of(req), req.kv
        if config is None or kv.cache_protected_len > state.prompt_len or kv.kv_committed_len != kv.kv_allocated_len:
            raise RuntimeError(
                f"request {req.rid}: the radix tree owns {kv.cache_protected_len} tokens of a prompt of "
                f"{state.prompt_len}, {kv.kv_committed_len} of {kv.kv_allocated_len} slots are committed; compacting "
                "would write shared slots. Please report this with the server's flags"
            )
        plan = plan_compaction(
            prompt_len=state.prompt_len,
            resident_len=kv.kv_allocated_len,
            budget=config.budget,
            page_size=self.parts.scheduler.token_to_kv_pool_allocator.page_size,
        )
        return config, plan

    def _shrink(self, job: Job) -> None:
        """Free the pages past what is kept and shorten the request's lengths."""
        req, plan, kv = job.req, job.plan, job.req.kv
        # From here on tokens and slots no longer match, so the tree must not take this request's tail.
        req.skip_radix_cache_insert = True
        if plan.freed_start < plan.freed_end:
            self.parts.scheduler.tree_cache.free_kv_row(kv, [(plan.freed_start, plan.freed_end)])
        kv.kv_allocated_len = kv.kv_committed_len = plan.kept_len
        if job.config.buffer > self.config.window:
            self.parts.query_window.release(kv.req_pool_idx)
        job.state.record(plan)
        self.stats.count(plan, job.state)

    def on_forward_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Enter the stream on which forward passes run, behind what the scheduler's stream has done so far."""
        scheduler = self.parts.scheduler
        if not scheduler.enable_overlap:
            return contextlib.nullcontext()
        scheduler.forward_stream.wait_stream(scheduler.schedule_stream)
        return _enter(scheduler.forward_stream_ctx, scheduler.forward_stream)


def _trace(job: Job, result: Compacted) -> None:
    """Add to the request's trace, if it has one, what was kept; ``job.state`` has not recorded the plan yet."""
    trace = trace_of(job.req)
    if trace is not None and result.kept_indices is not None:
        # Waits for the current stream, which must be the one that fills the indices; only who asks for it pays.
        trace.append(
            pack_compaction(
                result.kept_indices.cpu(),
                resident_len=job.plan.generated_len,
                evicted_before=job.state.evicted_tokens,
            )
        )


@contextlib.contextmanager
def _enter(context: Any, stream: Any) -> Any:
    with context:
        yield stream


def _runs_under(req_pool_idx: int, owner: Any) -> bool:
    """Tell whether a request still holds that row of ``req_to_token``."""
    return bool(owner.kv.req_pool_idx == req_pool_idx)
