"""Schedules, and those that only SGLang itself can judge once more alone, run and judged."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.fuzz.check import Verdict, check
from tests.fuzz.runner import Record, run_schedules
from tests.fuzz.schedule import FuzzRequest, Schedule, rid_of


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
        yield from _run_block(schedules[start:end], env)
        start = end


def _run_block(schedules: Sequence[Schedule], env: dict[str, str] | None) -> Iterator[Outcome]:
    records = run_schedules(schedules, env=env)
    questions = [
        (number, index, request, record["prompts"][rid_of(record["number"], index)])
        for number, (schedule, record) in enumerate(zip(schedules, records, strict=True))
        if "outputs" in record
        for index, request in enumerate(schedule.requests)
        if request.needs_itself_alone and not request.garbage and rid_of(record["number"], index) in record["prompts"]
    ]
    answers = _answers_alone(schedules[0], [question[2:] for question in questions], env)
    alone: dict[int, dict[int, Record]] = {}
    for (number, index, _, _), answer in zip(questions, answers, strict=True):
        alone.setdefault(number, {})[index] = answer
    for number, (schedule, record) in enumerate(zip(schedules, records, strict=True)):
        yield Outcome(schedule, record, check(schedule, record, alone.get(number)))


def _answers_alone(
    like: Schedule, questions: Sequence[tuple[FuzzRequest, list[int]]], env: dict[str, str] | None
) -> list[Record]:
    """Return what each request answers with nothing beside it; the same question is asked once."""
    plain: dict[str, Any] = {"after": None, "continues": False, "at_pass": 0, "abort_at": None, "abort_after": None}
    asked = [
        dataclasses.replace(like, requests=(dataclasses.replace(request, prompt=tuple(prompt), **plain),), events=())
        for request, prompt in questions
    ]
    different = list({schedule.to_json(): schedule for schedule in asked}.values())
    records = dict(
        zip((one.to_json() for one in different), run_schedules(different, env=env) if different else [], strict=True)
    )
    return [records[schedule.to_json()] for schedule in asked]
