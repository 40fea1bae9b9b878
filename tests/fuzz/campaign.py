"""Schedules, run and judged."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.fuzz.check import Verdict, check
from tests.fuzz.runner import Record, run_schedules
from tests.fuzz.schedule import Schedule


@dataclass(frozen=True)
class Outcome:
    """One schedule with what came of it."""

    schedule: Schedule
    record: Record
    verdict: Verdict


def run_and_check(schedules: Sequence[Schedule], *, env: dict[str, str] | None = None) -> Iterator[Outcome]:
    """Run schedules, neighbours of one server in one process, and judge each."""
    start = 0
    while start < len(schedules):
        end = start
        while end < len(schedules) and schedules[end].server == schedules[start].server:
            end += 1
        block = schedules[start:end]
        for schedule, record in zip(block, run_schedules(block, env=env), strict=True):
            yield Outcome(schedule, record, check(schedule, record))
        start = end
