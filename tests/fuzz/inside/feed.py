"""What a schedule has come in when, pass by pass, and what has come of it; in a scheduler process."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from tests.fuzz.draw.images import image_of
from tests.fuzz.inside.clean_up import CleanUp
from tests.fuzz.schedule import BY_PRIORITY, CAUSES, FuzzRequest, Schedule, rid_of
from tests.support.harness.messages import empty_output, generate_message, image_inputs


@dataclass(frozen=True)
class Note:
    """A message of the driver to itself on every rank; taken out before SGLang sees it."""

    retract_now: bool = False
    ended: int | None = None


class Run:
    """One schedule that is being run: what is due at which pass, and what has come of it; on one rank.

    With data-parallel attention each rank has requests of its own, and the first one tells all of the events.
    """

    def __init__(self, number: int, schedule: Schedule, tokenizer: Any, rank: int) -> None:
        self.number = number
        self._rank = rank
        self._tokenizer = tokenizer
        self.passes = 0
        self.max_running = 0
        self.began = time.perf_counter()
        self.outputs: dict[str, dict[str, Any]] = {}
        self.infos: dict[str, dict[str, Any]] = {}
        self.prompts: dict[str, list[int]] = {}
        # How many of those tokens are the request's prompt; the others came back as an answer.
        self.prompt_lens: dict[str, int] = {}
        self.retractions: dict[str, list[dict[str, Any]]] = {}
        # The pass at which each request was sent, in their order, and at which its end was seen; and how many were sent
        # before each time that the cache was flushed.
        self.sent: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        self.flushes: list[int] = []
        self._flushing: list[int] = []
        # Why a request is preempted that is in this pass.
        self.cause = BY_PRIORITY
        self._schedule = schedule
        self._server = schedule.server
        self._to_send = [i for i in range(len(schedule.requests)) if schedule.rank_of(i) == rank]
        # Only the first rank's aborts reach anybody.
        self._to_abort = [i for i, r in enumerate(schedule.requests) if r.abort_at is not None and rank == 0]
        self._to_cut = [i for i in self._to_send if schedule.requests[i].abort_after is not None and rank == 0]
        self._events = list(schedule.events)
        self._requests: dict[str, FuzzRequest] = {}
        self._clean_up = CleanUp(number, schedule)
        self._is_paused = False

    def _rid(self, index: int) -> str:
        return rid_of(self.number, index)

    def most_private(self, rid: str, *, is_compacted: bool) -> int:
        """Return the most tokens beyond its prompt that a request may hold which was never preempted."""
        request = self._requests[rid]
        if request.no_policy:
            return 2**31
        # What came back is whole until a window of queries was seen.
        before = 0 if is_compacted else self._num_carried(rid) + self._server.window
        return max(request.capacity(self._server), before)

    def _num_carried(self, rid: str) -> int:
        return len(self.prompts[rid]) - self.prompt_lens[rid]

    def knows(self, rid: str) -> bool:
        return rid in self.outputs

    def must_copy(
        self,
        rid: str,
        *,
        prompt_len: int,
        num_outputs: int,
        max_new_tokens: int,
        evicted: int,
        saved_len: int,
        pool: int,
    ) -> bool | None:
        """Return whether a request that loses its slots must be copied: it fits the pool so, and in no other way.

        None of one whose prompt may be compacted: what it needs for that is not counted here.

        Args:
            prompt_len: All that it came with, what is left of a named prefix included.
            pool: Tokens that it has for this request and others, without what other prefixes hold.
        """
        request, num_carried = self._requests[rid], self._num_carried(rid)
        if request.kept_of_prompt(self._server):
            return None

        def fits(resident_len: int) -> bool:
            num_generated = resident_len - prompt_len + num_carried
            until_due = max(request.capacity(self._server) - num_generated, self._server.window)
            return resident_len + min(max_new_tokens - num_outputs, until_due) <= pool

        is_bounded = not request.no_policy and evicted > 0
        return is_bounded and not fits(prompt_len + num_outputs) and fits(saved_len + 1)

    def unanswered(self) -> list[str]:
        return [rid for rid, output in self.outputs.items() if output["finish_reason"] is None]

    def questions(self) -> list[tuple[int, Schedule]]:
        """Return a schedule for each request that must be compared with itself alone, and the request's index.

        None with data-parallel attention, where all ranks would have to run each.
        """
        if self._server.attn_dp_size > 1:
            return []
        plain: dict[str, Any] = {"after": None, "continues": False, "at_pass": 0, "abort_at": None, "abort_after": None}
        asked = []
        for index, request in enumerate(self._schedule.requests):
            prompt = self.prompts.get(self._rid(index))
            if request.needs_itself_alone and not request.garbage and prompt is not None:
                marked = None if request.marked is None else self.prompt_lens[self._rid(index)]
                alone = dataclasses.replace(request, prompt=tuple(prompt), marked=marked, **plain)
                before = [dataclasses.replace(maker, **plain) for maker in self._makers_of(index)]
                if before:
                    alone = dataclasses.replace(alone, after=0)
                asked.append((index, dataclasses.replace(self._schedule, requests=(*before, alone), events=())))
        return asked

    def _makers_of(self, index: int) -> list[FuzzRequest]:
        """Return who made the named prefix that a request went on from."""
        used = self.infos.get(self._rid(index), {}).get("kv_prefix")
        makers = [one for one in self._schedule.requests if one.asks("create")]
        return [one for one in makers if self._schedule.requests[index].asks("use") and one.made == used]

    def flushed(self, is_flushed: bool) -> None:
        """Take the answer to one flush; the first is that of the driver, before anything was sent."""
        if self._flushing:
            num_sent = self._flushing.pop(0)
            self.flushes += [num_sent] * is_flushed

    def is_done(self) -> bool:
        return self._is_answered() and self._clean_up.is_done(self.infos)

    def _is_answered(self) -> bool:
        # A pause that no event ends is ended by the first rank.
        return not self._to_send and not self.unanswered() and (self._rank > 0 or not self._is_paused)

    def due(self) -> list[Any]:
        """Return what comes in at this pass, and go on to the next."""
        due: list[Any] = []
        self.cause = BY_PRIORITY
        for event in [event for event in self._events if event.at_pass <= self.passes]:
            self._events.remove(event)
            self.cause = CAUSES.get(event.kind, self.cause)
            due += self._messages(event.kind)
        if self._rank:
            due.clear()
        for rid, output in self.outputs.items():
            if output["finish_reason"] is not None:
                self.ended.setdefault(rid, self.passes)
        for index in list(self._to_send):
            request = self._schedule.requests[index]
            start = 0 if request.after is None else self.ended.get(self._rid(request.after))
            if start is not None and self.passes >= start + request.at_pass:
                self._to_send.remove(index)
                due.append(self._message(self._rid(index), request))
        if self._is_answered() and not self._clean_up.is_done(self.infos):
            due += [self._message(rid, request) for rid, request in self._clean_up.next(self.infos)]
        due += self._aborts()
        if self._is_paused and not self._events and not due and not self._rank:
            due += self._messages("continue")
        self.passes += 1
        return due

    def _message(self, rid: str, request: FuzzRequest) -> Any:
        from tests.support.harness.scheduler import Request

        prompt, num_before = list(request.prompt), 0
        if request.continues and request.after is not None:
            before = self._rid(request.after)
            prompt = [*self.prompts[before], *self.outputs[before]["output_ids"], *prompt]
            num_before = self.prompt_lens[before]
        prompt_len = len(prompt)
        if request.marked is not None:
            prompt_len = min(num_before + request.marked, prompt_len)
            request = dataclasses.replace(request, marked=prompt_len)
        self._requests[rid] = request
        self.sent[rid] = self.passes
        self.prompts[rid], self.prompt_lens[rid] = prompt, prompt_len
        self.outputs[rid] = empty_output(len(prompt))
        extra: dict[str, Any] = {} if request.priority is None else {"priority": request.priority}
        if (image := image_of(request)) is not None:
            extra["mm_inputs"] = image_inputs(image, len(prompt))
        return generate_message(
            rid,
            Request(
                input_ids=prompt,
                sampling_params=request.sampling_params,
                return_logprob=request.logprobs or request.prompt_logprobs,
                logprob_start_len=0 if request.prompt_logprobs else -1,
                extra=extra,
            ),
            self._tokenizer,
        )

    def _aborts(self) -> list[Any]:
        from sglang.srt.managers.io_struct import AbortReq

        due = []
        for index in list(self._to_abort):
            at_pass = self._schedule.requests[index].abort_at
            is_sent = self._rid(index) in self.outputs or self._schedule.rank_of(index) != self._rank
            if at_pass is not None and self.passes >= at_pass and is_sent:
                self._to_abort.remove(index)
                due.append(AbortReq(rid=self._rid(index)))
        for index in list(self._to_cut):
            output, least = self.outputs.get(self._rid(index)), self._schedule.requests[index].abort_after
            if output is not None and least is not None and len(output["output_ids"]) >= least:
                self._to_cut.remove(index)
                due.append(AbortReq(rid=self._rid(index)))
        return due

    def _messages(self, kind: str) -> list[Any]:
        from sglang.srt.managers import io_struct

        if kind == "retract":
            return [Note(retract_now=True)]
        if kind == "flush":
            self._flushing.append(len(self.sent))
            return [io_struct.FlushCacheReqInput()]
        if kind == "abort_all":
            return [io_struct.AbortReq(abort_all=True)]
        if kind == "continue":
            if not self._is_paused:
                return []
            self._is_paused = False
            return [io_struct.ContinueGenerationReqInput(torch_empty_cache=False)]
        self._is_paused = True
        return [io_struct.PauseGenerationReqInput(mode=kind.removeprefix("pause_"))]
