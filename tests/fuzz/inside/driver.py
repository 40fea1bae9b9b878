"""Inside a scheduler process: runs one schedule after another and writes down what came of each.

It stands where requests come in from the socket and where answers go out, so nothing depends on timing between
processes: a pass of the event loop is the only clock.
"""

import json
import os
import time
from typing import Any

from tests.fuzz.inside.feed import Note, Run
from tests.fuzz.schedule import Schedule
from tests.support.harness.messages import take

# Passes without any answer after which a schedule is taken to hang.
MOST_PASSES = 4000
# Idle passes after which nothing more will happen: the probe and SGLang's checks have run.
SETTLED = 3


def register(job: dict[str, Any], tp_rank: int) -> None:
    """Hook the scheduler that is about to be built; called in its process."""
    Driver(job["schedules"], os.path.join(job["folder"], "records"), tp_rank).register()


def _spare_time() -> None:
    """Leave out what takes seconds and means nothing here: compiling one function, and Python's garbage at a flush."""
    import torch._dynamo
    from sglang.srt.platforms import current_platform

    torch._dynamo.config.disable = True
    type(current_platform).empty_cache = lambda self: None


class Driver:
    """Feeds the scheduler of this process."""

    def __init__(self, schedules: list[Schedule], path: str, tp_rank: int) -> None:
        self._schedules = schedules
        self._has_own_requests = schedules[0].server.attn_dp_size > 1
        # Whether what comes in and goes out does so elsewhere.
        self._follows = tp_rank > 0 and not self._has_own_requests
        self._tp_rank = tp_rank
        self._path = path + (f".rank{tp_rank}" if tp_rank else "")
        self._scheduler: Any = None
        self._number = -1
        self._run: Run | None = None
        # Requests of the schedule that has just run whose right answer only SGLang knows: each is run once more, alone.
        self._to_ask: list[tuple[int, Schedule]] = []
        self._asked: int | None = None
        self._idle_passes = 0
        self._violations: list[dict[str, Any]] = []
        self._compactions: list[dict[str, Any]] = []

    def register(self) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        components = "sglang.srt.managers.scheduler_components"
        receiver = f"{components}.request_receiver.SchedulerRequestReceiver"
        batch = "sglang.srt.managers.schedule_batch"
        _spare_time()
        for target, function, kind in (
            ("sglang.srt.managers.scheduler.Scheduler.__init__", self._after_init, HookType.AFTER),
            (f"{receiver}._pull_raw_reqs", self._after_pull, HookType.AFTER),
            (f"{receiver}.recv_requests", self._after_receive, HookType.AFTER),
            (f"{components}.output_sender.SenderWrapper.send_output", self._instead_of_send, HookType.AROUND),
            (f"{batch}.release_req", self._before_release, HookType.BEFORE),
            (f"{batch}.Req.reset_for_retract", self._after_retract, HookType.AFTER),
        ):
            HookRegistry.register(target, function, kind)

    def _after_init(self, result: object, scheduler: Any, *args: object, **kwargs: object) -> None:
        self._scheduler = scheduler

    def _write(self, **record: Any) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(record) + "\n")

    # What comes in.

    def _after_pull(self, pulled: list[Any] | None, *args: object) -> list[Any] | None:
        # Only a rank that reads a socket gets a list; the others get theirs by broadcast.
        if pulled is None:
            return None
        from sglang.srt.managers.io_struct import FlushCacheReqInput, ShutdownReq

        self._watch()
        is_idle = self._scheduler.is_fully_idle() and not self._scheduler._engine_paused
        self._idle_passes = self._idle_passes + 1 if is_idle else 0
        if self._run is None:
            if self._to_ask:
                self._asked, schedule = self._to_ask.pop(0)
            elif self._number + 1 == len(self._schedules):
                return [ShutdownReq()]
            else:
                self._number += 1
                self._asked, schedule = None, self._schedules[self._number]
                self._write(started=self._number)
            rank = self._tp_rank if self._has_own_requests else 0
            self._run = Run(self._number, schedule, self._scheduler.tokenizer, rank)
            self._idle_passes = 0
            self._stats_before = _stats()
            return [FlushCacheReqInput()]
        run = self._run
        if run.passes == 0:
            self._check_whole_pool("before")
        due = run.due()
        if due:
            self._idle_passes = 0
        if run.passes > MOST_PASSES:
            self._violations.append({"violation": "hang", "missing": run.unanswered()})
            self._end_run()
            os._exit(3)
        if self._all_agree(run.is_done() and self._idle_passes >= SETTLED):
            self._end_run()
            due.append(Note(ended=self._number))
        return due

    def _all_agree(self, is_done: bool) -> bool:
        """Return whether all ranks that have requests have nothing more to do; all of them ask at every pass."""
        if not self._has_own_requests:
            return is_done
        import torch

        agreed = torch.tensor(int(is_done))
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN, group=self._scheduler.tp_cpu_group)
        return bool(agreed)

    def _after_receive(self, received: list[Any], *args: object, **kwargs: object) -> list[Any]:
        from sglang.srt.managers import scheduler as module

        notes = [message for message in received if isinstance(message, Note)]
        retracts = any(note.retract_now for note in notes)
        # The scheduler's own test switch, for the one pass that now begins.
        module.TEST_RETRACT, module.TEST_RETRACT_INTERVAL = retracts, 1
        module.TEST_RETRACT_NO_PREFILL_BS = 2**31
        if self._follows:
            self._watch()
            for note in notes:
                if note.ended is not None:
                    self._write(number=note.ended, violations=self._violations)
                    self._violations.clear()
        return [message for message in received if not isinstance(message, Note)]

    def _watch(self) -> None:
        import rkv_probe

        rkv_probe.get_probe().listener = self._on_probe

    def _on_probe(self, line: dict[str, Any]) -> None:
        if "violation" in line:
            self._violations.append(line)
        elif line["event"] == "compaction":
            self._compactions.append(line)
        elif line["event"] == "idle":
            held = sum(prefix.budget for prefix in _prefixes().all())
            if line["protected"] != held:
                self._violations.append({"violation": "locked", "prefixes": held, **line})
        elif line["event"] == "step" and self._run is not None:
            self._run.max_running = max(self._run.max_running, len(line["batch"]))
            for entry in line["running"]:
                most = self._run.most_private(entry["rid"], is_compacted=entry["compactions"] > 0)
                # A retracted request is prefilled again at its full length, until its next compaction.
                is_refilled = entry["retractions"] > 0 and entry["compactions"] == 0
                private = entry["allocated_len"] - entry["prompt_len"]
                if private > most and not is_refilled:
                    self._violations.append({"violation": "bound", "held": private, "most": most, **entry})

    # What goes out.

    def _instead_of_send(self, send: Any, wrapper: Any, output: Any, *args: object, **kwargs: object) -> None:
        from sglang.srt.managers.io_struct import (
            AbortReq,
            BatchTokenIDOutput,
            FlushCacheReqOutput,
            unwrap_from_pickle,
        )

        run = self._run
        if run is not None and isinstance(output, FlushCacheReqOutput):
            run.flushed(output.success)
        if run is None or self._follows or not isinstance(output, AbortReq | BatchTokenIDOutput):
            return
        take(run.outputs, output)
        if isinstance(output, BatchTokenIDOutput) and output.customized_info is not None:
            for key, values in unwrap_from_pickle(output.customized_info).items():
                for rid, value in zip(output.rids, values, strict=True):
                    if value:
                        run.infos.setdefault(rid, {})[key] = value[-1]

    # Preemption.

    def _before_release(self, *, req: Any, **kwargs: object) -> None:
        from rkv_sglang.integration.runtime.requests import known_state_of

        state = known_state_of(req)
        evicted = 0 if state is None else state.evicted_tokens
        seen = len(req.origin_input_ids) + len(req.output_ids)
        num_dropped = req.kv.kv_allocated_len + evicted - (seen - 1)
        self._held_at_release = (req.rid, num_dropped, evicted)
        self._must_copy = (
            self._run is not None
            and self._run.knows(req.rid)
            and not req.finished()
            and self._run.must_copy(
                req.rid,
                prompt_len=len(req.origin_input_ids),
                num_outputs=len(req.output_ids),
                max_new_tokens=req.sampling_params.max_new_tokens,
                evicted=evicted,
                saved_len=req.kv.kv_allocated_len - num_dropped,
                pool=self._scheduler.max_total_num_tokens - _prefixes().held_beside(req),
            )
        )

    def _after_retract(self, result: object, req: Any, *args: object) -> None:
        from rkv_sglang.integration.runtime.requests import known_state_of

        rid, num_dropped, evicted = self._held_at_release
        if self._run is not None and rid == req.rid:
            state = known_state_of(req)
            is_copied = state is not None and state.host_copy is not None
            place = {"outputs": len(req.output_ids), "in_flight": num_dropped == 1, "copied": is_copied}
            place |= {"evicted": evicted, "cause": self._run.cause, "must_copy": self._must_copy}
            self._run.retractions.setdefault(rid, []).append(place)

    # The end of a schedule.

    def _check_whole_pool(self, when: str) -> None:
        scheduler = self._scheduler
        free = scheduler.token_to_kv_pool_allocator.available_size()
        evictable = scheduler.tree_cache.evictable_size()
        total = scheduler.token_to_kv_pool_allocator.size
        if free + evictable != total or (when == "before" and evictable):
            self._violations.append({"violation": f"pool {when}", "free": free, "evictable": evictable, "total": total})
        if scheduler.waiting_queue or scheduler.running_batch.reqs:
            self._violations.append({"violation": f"requests left {when}"})

    def _end_run(self) -> None:
        run = self._run
        assert run is not None
        self._check_whole_pool("after")
        stats = {name: value - self._stats_before[name] for name, value in _stats().items()}
        place = {"number": run.number} if self._asked is None else {"of": run.number, "index": self._asked}
        if self._asked is None:
            self._to_ask = run.questions()
        self._write(
            **place,
            outputs=run.outputs,
            prompts=run.prompts,
            prompt_lens=run.prompt_lens,
            infos=run.infos,
            retractions=run.retractions,
            sent=run.sent,
            ended=run.ended,
            flushes=run.flushes,
            compactions=self._compactions,
            violations=self._violations,
            stats=stats,
            passes=run.passes,
            max_running=run.max_running,
            seconds=round(time.perf_counter() - run.began, 3),
        )
        self._violations, self._compactions = [], []
        self._run = None


def _stats() -> dict[str, int]:
    from rkv_sglang.integration.runtime.current import get_runtime

    return get_runtime().stats.as_dict()


def _prefixes() -> Any:
    from rkv_sglang.integration.runtime.current import get_runtime

    return get_runtime().parts.prefixes
