"""Answers that come back marked are judged by the mark."""

from collections import Counter

import pytest

from tests.fuzz.check import check, compare_oracle
from tests.fuzz.runner import run_schedules
from tests.fuzz.schedule import Event, FuzzRequest, Schedule, rid_of
from tests.fuzz.test_fuzz import PROMPT, SERVER

OTHER = tuple(range(60, 85))
REQUESTS = (
    # It is ended early, and goes on, twice.
    FuzzRequest(prompt=PROMPT, max_new_tokens=40, abort_after=14),
    FuzzRequest(prompt=(), max_new_tokens=20, after=0, continues=True, marked=0),
    FuzzRequest(prompt=PROMPT[:3], max_new_tokens=20, after=1, continues=True, marked=0),
    FuzzRequest(prompt=OTHER, max_new_tokens=30, marked=4, params={"frequency_penalty": 1.5}),
    FuzzRequest(prompt=OTHER, max_new_tokens=20, marked=len(OTHER)),
    FuzzRequest(prompt=OTHER, max_new_tokens=1, marked=1),
)


@pytest.fixture(scope="module")
def run():
    events = (Event(at_pass=9, kind="retract"), Event(at_pass=26, kind="retract"))
    schedule = Schedule(seed=0, server=SERVER, requests=REQUESTS, events=events)
    (record,) = run_schedules([schedule])
    return schedule, record


def test_what_came_back_is_found_right_and_counted(run):
    schedule, record = run
    verdict = check(schedule, record)
    assert verdict.problems == []
    # Of follow-ups the former prompt stays the prompt, however often the answer came back.
    lens = [record["prompt_lens"][rid_of(record["number"], index)] for index in range(len(REQUESTS))]
    assert lens == [len(PROMPT)] * 3 + [4, len(OTHER), 1]
    counts = {name: count for name, count in verdict.counts.items() if name.startswith("marked")}
    assert counts.pop("marked, preempted") > 0
    assert counts == {
        "marked": 5,
        "marked follow-ups": 2,
        "marked, something came back": 4,
        "marked, compacted": 3,
    }


@pytest.mark.parametrize("index", [1, 2, 3])
def test_an_answer_that_ignores_the_mark_is_not_passed(run, index):
    schedule, record = run
    rid = rid_of(record["number"], index)
    answer = {**record["outputs"][rid], "info": record["infos"][rid], "prompt": record["prompts"][rid]}
    places = record["retractions"].get(rid, [])
    right, wrong = record["prompt_lens"][rid], len(record["prompts"][rid])

    def problems(prompt_len):
        return compare_oracle(
            SERVER, REQUESTS[index], {**answer, "prompt_len": prompt_len}, places, Counter(), pool=SERVER.pool
        )

    assert problems(right) == [] and problems(wrong) != []
    said = {**record, "prompt_lens": {**record["prompt_lens"], rid: wrong}}
    assert check(schedule, said).problems
