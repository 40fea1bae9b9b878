"""What is drawn of answers that come back."""

import random

from tests.fuzz.draw.marks import with_marks
from tests.fuzz.draw.schedules import schedule_of
from tests.fuzz.schedule import FuzzRequest, Schedule
from tests.fuzz.test_fuzz import SERVER


def test_marks_lie_within_what_they_mark_and_only_where_one_may_be():
    seeds = random.SystemRandom().sample(range(10**6), 150)
    requests = [request for seed in seeds for request in schedule_of(seed).requests]
    marked = [request for request in requests if request.marked is not None]
    print(f"seeds of this run: {seeds[:3]}, ...")
    for request in marked:
        assert not request.garbage and not request.no_policy and request.prefix is None
        least = 0 if request.continues else 1
        assert least <= request.marked <= max(len(request.prompt), 9 if request.continues else 0)
    assert any(request.continues for request in marked) and not all(request.continues for request in marked)
    assert 0.05 * len(requests) < len(marked) < 0.5 * len(requests)


def test_who_is_not_marked_stays_as_it_was(rng):
    plain = FuzzRequest(prompt=(5, 6, 7), max_new_tokens=9)
    kinds = (plain, FuzzRequest(prompt=(5,), max_new_tokens=9, after=0, continues=True))
    schedule = Schedule(seed=0, server=SERVER, requests=kinds * 200)
    found = with_marks(rng.randrange(10**6), schedule).requests
    for was, is_now in zip(schedule.requests, found, strict=True):
        assert is_now == was or is_now.marked is not None
    assert {request.marked for request in found} > {None, 0, 1}
