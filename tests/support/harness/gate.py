"""Decides, inside a scheduler process, at which pass of the event loop each request arrives.

Requests reach the scheduler through its real socket, but when they get there depends on the machine. The gate stands
between socket and scheduler: it waits until all have come, then hands out each at its own pass, so a run is repeatable.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arrival:
    """When one request arrives and when it is aborted; see ``tests.support.harness.scheduler.Request``."""

    rid: str
    at_step: int
    when_idle: bool
    abort_at_step: int | None
    abort_after_tokens: int | None


@dataclass(frozen=True)
class Control:
    """A message to the scheduler itself, at the first pass of the event loop from ``at_step`` on.

    Attributes:
        at_step: The pass.
        message: Name of a class of ``sglang.srt.managers.io_struct``, such as ``PauseGenerationReqInput``.
        fields: What it is made with.
        after_tokens: Not before the running request of this id has this many output tokens.
        wait: Not before so many passes after the control before it.
    """

    at_step: int
    message: str
    fields: dict[str, Any] = field(default_factory=dict)
    after_tokens: tuple[str, int] | None = None
    wait: int = 0


class Gate:
    """Hooks of SGLang's request receiver and scheduler; one per process."""

    def __init__(self, arrivals: Sequence[Arrival], controls: Sequence[Control] = ()) -> None:
        self._arrivals = list(arrivals)
        self._controls = sorted(controls, key=lambda control: control.at_step)
        self._waiting_for = {arrival.rid for arrival in arrivals}
        self._held: dict[str, Any] = {}
        self._control: list[Any] = []
        self._to_abort: list[Arrival] = []
        self._scheduler: Any = None
        self._pass = -1
        self._idle_passes = 0
        self._last_control_pass = 0

    def register(self) -> None:
        """Register the hooks; SGLang applies them when the scheduler process loads its plugins."""
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(
            "sglang.srt.managers.scheduler.Scheduler.ingest_requests", self._before_ingest, HookType.BEFORE
        )
        HookRegistry.register(
            "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver._pull_raw_reqs",
            self._after_pull,
            HookType.AFTER,
        )

    def _before_ingest(self, scheduler: Any, *args: object, **kwargs: object) -> None:
        self._scheduler = scheduler

    def _after_pull(self, pulled: list[Any] | None, *args: object) -> list[Any] | None:
        # Only the rank that reads the socket gets a list; the others get theirs by broadcast.
        if pulled is None:
            return None
        for message in pulled:
            rid = getattr(message, "rid", None)
            if rid in self._waiting_for and rid not in self._held:
                self._held[rid] = message
            else:
                self._control.append(message)
        self._waiting_for -= self._held.keys()
        if self._waiting_for:
            return []
        self._pass += 1
        return self._due()

    def _due(self) -> list[Any]:
        from sglang.srt.managers import io_struct
        from sglang.srt.managers.io_struct import AbortReq

        due: list[Any] = []
        is_idle = self._scheduler.is_fully_idle()
        self._idle_passes = self._idle_passes + 1 if is_idle else 0
        for arrival in list(self._arrivals):
            if arrival.when_idle:
                # Nothing later in the list overtakes it, and it waits for everything before it.
                if self._idle_passes < 2 or due:
                    break
            elif self._pass < arrival.at_step:
                continue
            due.append(self._held[arrival.rid])
            self._arrivals.remove(arrival)
            self._to_abort.append(arrival)
        for arrival in list(self._to_abort):
            if self._is_abort_due(arrival):
                due.append(AbortReq(rid=arrival.rid))
                self._to_abort.remove(arrival)
        while self._controls and self._is_control_due(self._controls[0]):
            control = self._controls.pop(0)
            self._last_control_pass = self._pass
            due.append(getattr(io_struct, control.message)(**control.fields))
        if due:
            self._idle_passes = 0
        elif not self._arrivals and not self._is_any_control_to_come() and self._idle_passes >= 2:
            # Control messages (the shutdown) pass when all is done and the idle checks have run.
            due, self._control = self._control, []
        return due

    def _is_abort_due(self, arrival: Arrival) -> bool:
        if arrival.abort_at_step is not None:
            return self._pass >= arrival.abort_at_step
        return arrival.abort_after_tokens is not None and self._has_tokens(arrival.rid, arrival.abort_after_tokens)

    def _is_any_control_to_come(self) -> bool:
        # What waits for a request's tokens when all requests are done waits for ever.
        return bool(self._controls) and self._controls[0].after_tokens is None

    def _is_control_due(self, control: Control) -> bool:
        if self._pass < max(control.at_step, self._last_control_pass + control.wait):
            return False
        return control.after_tokens is None or self._has_tokens(*control.after_tokens)

    def _has_tokens(self, rid: str, num_tokens: int) -> bool:
        scheduler = self._scheduler
        batches = [batch for batch in (scheduler.running_batch, scheduler.last_batch) if batch is not None]
        return any(req.rid == rid and len(req.output_ids) >= num_tokens for batch in batches for req in batch.reqs)
