"""The requests that are compacted in one step, and what both ways to do it share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

from torch import Tensor

from rkv_sglang.cache.compact import DueRequest, PlanT
from rkv_sglang.cache.step_tensors import read_slots
from rkv_sglang.cache.trace import pack_compaction
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.parts import Parts, Scored
from rkv_sglang.integration.runtime.requests import PROMPT_TRACE_ATTRIBUTE, trace_of
from rkv_sglang.sizes.lengths import RequestState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


@dataclass(frozen=True, kw_only=True)
class Job(Generic[PlanT]):
    """One request to compact in this step."""

    req: Req
    state: RequestState
    config: PolicyConfig
    plan: PlanT

    @property
    def logical_len(self) -> int:
        """Tokens ever seen; ask before ``state`` has recorded the plan."""
        return self.state.logical_len(self.plan.resident_len)

    @property
    def wants_trace(self) -> bool:
        """Whether what is kept is recorded."""
        return trace_of(self.req) is not None

    def record_trace(self, kept_indices: Any) -> None:
        """Record what was kept, for a request that asked for it; before ``state`` has recorded the plan.

        Waits for the current stream, which must be the one that fills the indices; only who asks for it pays.

        Args:
            kept_indices: Of the generated tokens, ascending, ``[num_layers, num_kv_heads, budget]``.
        """
        trace = trace_of(self.req)
        if trace is not None:
            trace.append(
                pack_compaction(
                    kept_indices.cpu(),
                    resident_len=self.plan.generated_len,
                    evicted_before=self.state.evicted_generated_tokens,
                )
            )

    def record_prompt_trace(self, kept_indices: Any) -> None:
        """Record what was kept of the prompt, as ``record_trace`` does of generated tokens.

        Args:
            kept_indices: Of the prompt, ascending, ``[num_layers, num_kv_heads, plan.budget]``.
        """
        record = pack_compaction(kept_indices.cpu(), resident_len=self.state.prompt_len, evicted_before=0)
        setattr(self.req, PROMPT_TRACE_ATTRIBUTE, record)


def refuse_odd_lengths(req: Any, state: RequestState) -> None:
    """Raise ``RuntimeError`` if compacting a request would write slots that others share, or lose one of its own."""
    kv = req.kv
    if kv.cache_protected_len > state.held_prompt_len or kv.kv_committed_len != kv.kv_allocated_len:
        raise RuntimeError(
            f"request {req.rid}: the radix tree owns {kv.cache_protected_len} tokens of a prompt of "
            f"{state.held_prompt_len}, {kv.kv_committed_len} of {kv.kv_allocated_len} slots are committed; compacting "
            "would write shared slots. Please report this with the server's flags"
        )


@dataclass(frozen=True, kw_only=True)
class Scoring(Generic[PlanT]):
    """What scores are made of, for ``compact_requests`` and ``choose_by_scores``, on the stream that they run on.

    Attributes:
        requests: One of each job.
        read_queries: The window's queries of some of them in some layers.
        stream: The stream of forward passes; None if there is no other.
    """

    requests: list[DueRequest[PlanT]]
    read_queries: Callable[[slice, slice], Tensor]
    stream: Any


@contextlib.contextmanager
def scoring(
    parts: Parts, scored: Scored, batch: ScheduleBatch, jobs: Sequence[Job[PlanT]], *, of_prompts: bool = False
) -> Iterator[Scoring[PlanT]]:
    """Enter the stream on which forward passes run, with all that the scores of these requests of a batch need.

    What is done within is observed by the metrics, if there are any.

    Args:
        of_prompts: The prompts are chosen from, so what they find within themselves is not needed again.
    """
    pool_size = parts.scheduler.max_total_num_tokens
    rows = [job.req.kv.req_pool_idx for job in jobs]
    # Under overlap the scheduler may rewrite the map before the device gets to the scores, so the slots are copied now,
    # on the scheduler's stream.
    slots = read_slots(batch.req_to_token_pool.req_to_token, rows, [job.plan.resident_len for job in jobs])
    with on_forward_stream(parts.scheduler) as stream, parts.timed():
        scored.query_window.flush()
        scored.follow_scales()
        # All slots are views of one tensor.
        if stream is not None and slots[0].is_cuda:
            slots[0].record_stream(stream)
        requests = [
            DueRequest(
                job.plan,
                own,
                job.logical_len,
                kept_state=job.state.kept_state,
                memory=job.state.memory,
                observed=job.state.observed,
                wants_indices=job.wants_trace,
                prompt_hits=None
                if of_prompts
                else scored.prompt_hits_room.hits_of(
                    job.state, scored.buffers, capacity=job.config.capacity, most_tokens=pool_size
                ),
            )
            for job, own in zip(jobs, slots, strict=True)
        ]
        places = [(row, request.logical_len) for row, request in zip(rows, requests, strict=True)]
        yield Scoring(
            requests=requests,
            read_queries=lambda part, layers: scored.query_window.read(places[part], layers),
            stream=stream,
        )


def on_forward_stream(scheduler: Any) -> contextlib.AbstractContextManager[Any]:
    """Enter the stream on which forward passes run, behind what the scheduler's stream has done so far."""
    if not scheduler.enable_overlap:
        return contextlib.nullcontext()
    scheduler.forward_stream.wait_stream(scheduler.schedule_stream)
    return _enter(scheduler.forward_stream_ctx, scheduler.forward_stream)


@contextlib.contextmanager
def _enter(context: Any, stream: Any) -> Any:
    with context:
        yield stream
