"""The policy inside one scheduler process: before every decode step it compacts what is due in the running batch."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from rkv_sglang.cache.step_tensors import subtract_evicted
from rkv_sglang.config import HEAD, REQUEST, PolicyConfig
from rkv_sglang.integration.runtime import drop, gather
from rkv_sglang.integration.runtime.jobs import Job, on_forward_stream, refuse_odd_lengths
from rkv_sglang.integration.runtime.metrics import metrics_for
from rkv_sglang.integration.runtime.parts import Parts, Scored, scored_parts
from rkv_sglang.integration.runtime.prompts import compaction, pending
from rkv_sglang.integration.runtime.requests import (
    CONFIG_ATTRIBUTE,
    PROMPT_ATTRIBUTE,
    TRACE_ATTRIBUTE,
    config_for,
    end_of_images,
    head_start_of,
    known_state_of,
    marked_prompt_len,
    state_of,
    wants_trace,
)
from rkv_sglang.integration.runtime.stats import PolicyStats
from rkv_sglang.integration.startup.calibration import bounded, calibrated
from rkv_sglang.integration.startup.memory_report import report_memory
from rkv_sglang.integration.startup.meters.meter import Meter
from rkv_sglang.integration.startup.sliding import attention_window
from rkv_sglang.policies import looks_at_nothing, make_policy
from rkv_sglang.sizes.lengths import NEVER, can_ever_compact, decodes_again, steps_until_due
from rkv_sglang.sizes.prompt_plan import PromptPlan, can_compact_prompt
from rkv_sglang.sizes.stagger import most_head_start

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner


class Runtime:
    """One per scheduler process, made before the scheduler is built and bound to its parts as they appear.

    Its ``meter`` is there only while the model's queries are measured, before any request is served.
    """

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self.policy = make_policy(config)
        self.stats = PolicyStats()
        # Whether the policy, as it is set, needs no queries, keys or values: nothing is recorded then.
        self.looks_at_nothing = looks_at_nothing(config)
        self.meter: Meter | None = None
        # The one place that chooses between the two ways.
        self._way: Any = gather if config.granularity == HEAD else drop
        self._scored: Scored | None = None
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
        if not self.looks_at_nothing:
            self._scored = scored_parts(model_runner, self.config, self.policy)

    def bind_scheduler(self, scheduler: Scheduler) -> None:
        """Take the scheduler once it is built, and say what was set up."""
        scored = self._scored
        if scored is None and not self.looks_at_nothing:
            raise RuntimeError("SGLang built a scheduler without a KV pool; please report this with the server's flags")
        if scored is not None:
            scored = replace(scored, attention=calibrated(scored.attention, scheduler, self))
            self.policy = bounded(scored.attention, scored.layers, scheduler, self)
        if self.config.granularity == REQUEST and scheduler.device != "cpu":
            drop.warm_up(self.config, self.policy, scheduler, scored)
        side_bytes = 0 if scored is None else scored.query_window.num_bytes
        self.bind(
            Parts(
                scheduler=scheduler,
                scored=scored,
                metrics=metrics_for(scheduler, side_bytes=side_bytes),
                # With one choice for all layers, it is the window that holds them.
                attention_window=attention_window(scored.layers) if scored and self.config.granularity == HEAD else 0,
            )
        )
        num_query_rows = 0 if scored is None else scored.query_window.num_rows
        report_memory(scheduler, self.config, side_bytes=side_bytes, num_query_rows=num_query_rows)

    def bind(self, parts: Parts) -> None:
        """Take the parts, once."""
        self._parts = parts

    def record_queries(self, layer_id: int, queries: torch.Tensor, forward_batch: Any) -> None:
        """Record one decode step's queries of one layer (called within the forward pass, so within CUDA graphs)."""
        scored = self._scored
        if scored is not None and (scored.query_window.always_capture or scored.query_window.active):
            scored.query_window.capture(
                layer_id - scored.first_layer, queries, forward_batch.req_pool_indices, forward_batch.positions
            )

    def read_request(self, req: Req) -> None:
        """Take what the request asks of the policy; call once, before anything else looks at it.

        Raises:
            ValueError: It asks for what cannot be; one line.
        """
        asked = req.sampling_params.custom_params
        config = config_for(asked, self.config, self.parts.scheduler.max_total_num_tokens, self.parts.attention_window)
        setattr(req, CONFIG_ATTRIBUTE, config)
        num_tokens = len(req.origin_input_ids)
        prompt_len = marked_prompt_len(asked, num_tokens, end_of_images(req))
        if prompt_len < num_tokens:
            setattr(req, PROMPT_ATTRIBUTE, prompt_len)
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
        config, state = self.config_of(req), state_of(req)
        return config is not None and (
            can_ever_compact(config, state.max_new_tokens)
            or can_compact_prompt(config, state.prompt_len, state.max_new_tokens)
        )

    @property
    def page_size(self) -> int:
        """Tokens of a page of the pool."""
        return int(self.parts.scheduler.token_to_kv_pool_allocator.page_size)

    def before_decode(self, batch: ScheduleBatch) -> None:
        """Compact what is due in the running batch. Idempotent between two decode steps.

        Runs on the scheduler's thread before admission, so freed slots are there for waiting requests, and while the
        forward pass in flight has already been counted in every length. Mutates the KV pool, the requests' lengths,
        the allocator and ``batch.seq_lens``, or the map instead of the pool; never ``orig_seq_lens``, which stays
        logical.
        """
        forward_ct = self.parts.scheduler.forward_ct
        due = [
            i
            for i, req in enumerate(batch.reqs)
            if (state := known_state_of(req)) is None or state.next_check <= forward_ct
        ]
        if due:
            with_prompts = [i for i in due if pending.is_due(self.parts, self.config_of(batch.reqs[i]), batch.reqs[i])]
            if with_prompts:
                self._compact_prompts(batch, with_prompts)
            due = [i for i in due if self._is_due(batch.reqs[i], forward_ct)]
            if due:
                self._compact(batch, due)
            elif self.parts.scored is not None:
                with self.on_forward_stream():
                    self.parts.scored.query_window.flush()

    def _is_due(self, req: Req, forward_ct: int) -> bool:
        """Decide for one request; see that it has a query row in time; set when to look again."""
        state, config = state_of(req), self.config_of(req)
        if req.finished() or not req.kv.holds_kv:
            return False
        resident_len = req.kv.kv_allocated_len
        if config is None or not self.may_compact(req) or not decodes_again(state, resident_len):
            state.next_check = NEVER
            self.forget_queries(req)
            return False
        due_in: float = NEVER
        if can_ever_compact(config, state.max_new_tokens):
            head_start = head_start_of(req, config)
            earliest = most_head_start(config) if head_start is None else head_start
            due_in = steps_until_due(config, state.held_prompt_len, resident_len, req.decode_batch_idx, earliest)
            if head_start is None:
                due_in = max(due_in, 1)
        remaining = due_in
        if pending.pending_budget(self.parts, config, req) > 0:
            remaining = min(due_in, max(config.window - req.decode_batch_idx, 0))
        if remaining > self.config.window:
            state.next_check = forward_ct + remaining - self.config.window
            # It has a row if only its prompt was compacted now.
            self.forget_queries(req)
            return False
        scored = self.parts.scored
        if scored is not None and not scored.query_window.has_row(req.kv.req_pool_idx, req):
            scored.query_window.acquire(req.kv.req_pool_idx, req, _runs_under)
        state.next_check = forward_ct + remaining
        return due_in == 0

    def _compact_prompts(self, batch: ScheduleBatch, due: list[int]) -> None:
        """Compact the prompts of those of these requests for which there is room, as ``_compact`` does the rest."""
        configs = [self.config_of(batch.reqs[i]) for i in due]
        if jobs := compaction.jobs_with_room(self.parts, batch, due, configs):
            compaction.compact(self.parts, self.policy, self.config.window, batch, list(jobs.values()))
            self._count(batch, jobs)

    def _compact(self, batch: ScheduleBatch, due: list[int]) -> None:
        """Compact the requests of ``batch.reqs`` whose indices are in ``due``, and bring every length up to it."""
        jobs = {i: self._job(batch.reqs[i]) for i in due}
        self._way.compact(self.parts, self.policy, self.config.window, batch, list(jobs.values()))
        self._count(batch, jobs)

    def _count(self, batch: ScheduleBatch, jobs: dict[int, Job[Any]]) -> None:
        """Bring every length up to what was compacted: of each request by its place in the batch."""
        for job in jobs.values():
            self._shorten(job)
        if self.parts.metrics is not None:
            self.parts.metrics.count(self.stats)
        evicted = [0] * len(batch.reqs)
        for i, job in jobs.items():
            evicted[i] = job.plan.evicted_tokens
        batch.seq_lens, batch.seq_lens_cpu = subtract_evicted(batch.seq_lens, batch.seq_lens_cpu, evicted)
        batch.seq_lens_sum = None
        # Scheduler._get_new_batch_prefill_raw sets it where nothing fits, and SGLang clears it only when a request
        # leaves the batch; here room appears without that.
        batch.batch_is_full = False

    def _job(self, req: Req) -> Job[Any]:
        """Plan one request's compaction by its settings; nothing is changed."""
        state, config = state_of(req), self.config_of(req)
        assert config is not None, "a request without a policy is never due"
        refuse_odd_lengths(req, state)
        plan = self._way.plan(
            config,
            prompt_len=state.held_prompt_len,
            resident_len=req.kv.kv_allocated_len,
            page_size=self.page_size,
        )
        return Job(req=req, state=state, config=config, plan=plan)

    def _shorten(self, job: Job[Any]) -> None:
        """Bring the request's lengths up to its compaction."""
        kv = job.req.kv
        # From here on tokens and slots no longer match, so the tree must not take this request's tail.
        job.req.skip_radix_cache_insert = True
        kv.kv_allocated_len = kv.kv_committed_len = job.plan.kept_len
        # A request that was computed again keeps up to a block more than its budget, and is due that much sooner.
        steps_left = job.config.capacity - job.plan.budget
        is_needed_soon = steps_left <= self.config.window or isinstance(job.plan, PromptPlan)
        if self.parts.scored is not None and not is_needed_soon:
            self.parts.scored.query_window.release(kv.req_pool_idx)
        job.state.record(job.plan)
        self.stats.count(job.plan, job.state)

    def on_forward_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Enter the stream on which forward passes run, behind what the scheduler's stream has done so far."""
        return on_forward_stream(self.parts.scheduler)

    def forget_queries(self, req: Req) -> None:
        """Take back the row of a request whose queries are not needed any more, if it has one."""
        scored = self.parts.scored
        if scored is not None and scored.query_window.has_row(req.kv.req_pool_idx, req):
            scored.query_window.release(req.kv.req_pool_idx)

    def report(self) -> dict[str, Any]:
        """Return the counters of this scheduler, the share of compressed answers, side bytes and the settings."""
        stats, scored = self.stats, self._scored
        share = stats.answers_compressed / stats.requests_answered if stats.requests_answered else 0.0
        return {
            **stats.as_dict(),
            "compressed_share": round(share, 4),
            "side_buffer_bytes": 0 if scored is None else scored.query_window.num_bytes,
            "settings": asdict(replace(self.config, parameters=dict(self.config.parameters))),
        }

    @property
    def trace_shape(self) -> tuple[int, int]:
        """Layers and KV heads that a trace has rows of: one for all where they keep the same."""
        if self.config.granularity == REQUEST or self.parts.scored is None:
            return 1, 1
        keys = self.parts.scored.buffers.keys
        return keys.num_layers, keys.num_kv_heads


def _runs_under(req_pool_idx: int, owner: Any) -> bool:
    """Tell whether a request still holds that row of ``req_to_token``."""
    return bool(owner.kv.req_pool_idx == req_pool_idx)
