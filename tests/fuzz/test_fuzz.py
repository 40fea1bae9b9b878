"""A short search, new every time: schedules over the real scheduler, steps on the real pools; and it finds faults."""

import dataclasses
from collections import Counter

import pytest

from devtools.tiny_models import SINKS_MODEL
from tests.e2e.workload import random_ids
from tests.fuzz.campaign import run_and_check
from tests.fuzz.check import ENDED_IN_THE_QUEUE, check, compare_oracle
from tests.fuzz.draw.schedules import BLOCK, schedule_of
from tests.fuzz.draw.servers import server_of
from tests.fuzz.expected.answers import expected_of
from tests.fuzz.pool_machine import STEPS, run_search, run_steps
from tests.fuzz.runner import run_schedules
from tests.fuzz.schedule import Event, FuzzRequest, Schedule, rid_of
from tests.fuzz.server import CALIBRATION_ROOM, ServerConfig
from tests.fuzz.shrink import shrink

# Servers and schedules of each; a run of thousands is a command of its own.
SERVERS, OF_ONE_SERVER = 2, 8

SERVER = ServerConfig(
    policy="rkv",
    budget=6,
    buffer=4,
    window=2,
    page_size=4,
    chunk_size=0,
    pool=128,
    overlap=True,
    radix=True,
    stagger=False,
    priority=False,
    max_running=8,
)
PROMPT = tuple(range(20, 40))
ENDED = {"type": "abort", "message": ENDED_IN_THE_QUEUE, "status_code": None}


def test_random_schedules_give_right_tokens_and_lose_nothing(rng):
    schedules = []
    for _ in range(SERVERS):
        block = rng.randrange(10**6)
        # Two ranks take the time of many schedules, and so does an interpreted kernel.
        while server_of(block).tp_size > 1 or server_of(block).model == SINKS_MODEL:
            block += 1
        schedules += [schedule_of(block * BLOCK + i) for i in range(OF_ONE_SERVER)]
    problems = [
        f"python -m tests.fuzz --replay {outcome.schedule.seed}: {outcome.verdict.problems[:3]}"
        for outcome in run_and_check(schedules)
        if outcome.verdict.problems
    ]
    assert problems == []


def test_with_data_parallel_attention_the_answers_of_all_ranks_are_right(rng):
    block = rng.randrange(10**6)
    while server_of(block).attn_dp_size == 1:
        block += 1
    schedules = (schedule_of(block * BLOCK + i) for i in range(BLOCK))
    schedule = next(own for own in schedules if {own.rank_of(index) for index in range(len(own.requests))} == {0, 1})
    (outcome,) = run_and_check([schedule])
    assert not outcome.verdict.problems, f"python -m tests.fuzz --replay {schedule.seed}"
    assert len(outcome.record["outputs"]) == len(schedule.requests)


def test_a_server_that_asks_its_model_before_it_serves_has_room_for_that(rng):
    first = rng.randrange(10**6)
    servers = [server_of(block) for block in range(first, first + 400)]
    asking = [server for server in servers if server.policy == "triattention"]
    assert asking and all(server.pool >= CALIBRATION_ROOM + 2 * server.page_size for server in asking)


def test_random_steps_on_the_real_pools_lose_and_spoil_nothing(rng):
    first = rng.randrange(10**6)
    answer = run_steps(first, 8000)
    assert answer["status"] == "ok", f"python -m tests.fuzz.pool_machine --replay {answer.get('seed')}: {answer}"
    done = {name: sum(row["count"] for row in answer["rows"] if row["step"] == name) for name in STEPS}
    assert all(done[name] > 0 for name in ("decode", "admit", "finish", "abort", "retract", "readmit", "match"))


def test_steps_that_hypothesis_chooses_on_the_real_pools_lose_and_spoil_nothing():
    answer = run_search(examples=12, steps=30)
    assert answer["status"] == "ok", answer
    assert answer["taken"]["decode"] > 50


def test_a_schedule_is_the_same_each_time_and_survives_its_file(tmp_path, seed):
    schedule = schedule_of(seed)
    schedule.save(tmp_path / "one.json")
    assert Schedule.from_json((tmp_path / "one.json").read_text()).to_json() == schedule.to_json()
    assert schedule_of(seed).to_json() == schedule.to_json()


def asking(prefix, *, prompt=PROMPT[:1], max_new_tokens=1, **fields):
    return FuzzRequest(prompt=prompt, max_new_tokens=max_new_tokens, prefix=prefix, **fields)


# A prefix that is made, used, listed, deleted, and asked for once more.
PREFIX_REQUESTS = (
    asking({"create": "a", "length": 15, "budget": 8}, prompt=PROMPT),
    asking({"create": "a", "length": 14, "budget": 8}, prompt=PROMPT, at_pass=1),
    asking("a", prompt=PROMPT[:3], max_new_tokens=30, after=0),
    asking({"list": True}, after=0),
    asking({"delete": "a"}, after=2),
    asking("a", prompt=PROMPT[:3], max_new_tokens=30, after=4),
)


@pytest.fixture(scope="module")
def runs():
    """Return schedules with their records: all kinds of answers, requests that outgrow the pool, a named prefix."""
    requests = (
        FuzzRequest(prompt=PROMPT, max_new_tokens=40),
        FuzzRequest(prompt=PROMPT[:7], max_new_tokens=40, budget=9, abort_after=20),
        FuzzRequest(prompt=PROMPT[3:], max_new_tokens=30),
        FuzzRequest(prompt=PROMPT[5:], max_new_tokens=20, no_policy=True),
        FuzzRequest(prompt=PROMPT[:2], max_new_tokens=9, garbage=True),
    )
    mixed = Schedule(seed=0, server=SERVER, requests=requests, events=(Event(at_pass=25, kind="retract"),))
    long = tuple(FuzzRequest(prompt=PROMPT[:length], max_new_tokens=170) for length in (7, 9))
    kinds = {130: "retract", 145: "pause_retract", 148: "continue"}
    events = tuple(Event(at_pass=at_pass, kind=kind) for at_pass, kind in kinds.items())
    schedules = [mixed, Schedule(seed=1, server=SERVER, requests=long, events=events)]
    schedules.append(Schedule(seed=2, server=SERVER, requests=PREFIX_REQUESTS))
    records = run_schedules(schedules)
    for schedule, record in zip(schedules, records, strict=True):
        assert check(schedule, record).problems == []
    return list(zip(schedules, records, strict=True))


@pytest.fixture
def one_run(runs):
    return runs[0]


def spoiled(record, **changes):
    return {**record, **changes}


def test_a_record_that_differs_in_one_thing_is_not_passed(one_run):
    schedule, record = one_run
    rids = [rid_of(record["number"], index) for index in range(len(schedule.requests))]
    assert record["retractions"], "nothing was retracted"
    output, info = record["outputs"][rids[2]], record["infos"][rids[2]]

    def with_output(**fields):
        return spoiled(record, outputs={**record["outputs"], rids[2]: {**output, **fields}})

    def with_info(**fields):
        return spoiled(record, infos={**record["infos"], rids[2]: {**info, **fields}})

    tokens = output["output_ids"]
    for wrong in (
        with_output(output_ids=[*tokens[:-1], tokens[-1] + 1]),
        with_output(output_ids=tokens[:-1]),
        with_output(finish_reason={"type": "abort", "message": "for no reason"}),
        with_output(finish_reason=None),
        with_info(kv_compactions=info["kv_compactions"] + 1),
        with_info(kv_evicted_tokens=info["kv_evicted_tokens"] - 1),
        with_info(kv_policy="none"),
        spoiled(record, violations=[{"violation": "ownership"}]),
        spoiled(record, stats={**record["stats"], "compactions": record["stats"]["compactions"] + 1}),
        spoiled(record, stats={**record["stats"], "requests_compressed": 0}),
    ):
        assert check(schedule, wrong).problems, wrong
    ended = spoiled(record, outputs={**record["outputs"], rids[4]: {**output, "finish_reason": ENDED}})
    all_ended = dataclasses.replace(schedule, events=(*schedule.events, Event(at_pass=9, kind="abort_all")))
    one_ended = dataclasses.replace(schedule.requests[4], abort_at=3)
    one_ended = dataclasses.replace(schedule, requests=(*schedule.requests[:4], one_ended))
    assert check(schedule, ended).problems
    assert not check(all_ended, ended).problems and not check(one_ended, ended).problems
    without_events = dataclasses.replace(schedule, events=(), requests=schedule.requests[:3])
    assert any("ran out of memory" in problem for problem in check(without_events, record).problems)


def test_a_record_of_named_prefixes_that_differs_in_one_thing_is_not_passed(runs):
    schedule, record = runs[2]
    counts = check(schedule, record).counts
    assert (counts["prefixes made"], counts["prefixes deleted"], counts["behind a prefix"]) == (1, 1, 1)
    assert counts["refused for a prefix"] == 2
    rids = [rid_of(record["number"], index) for index in range(len(schedule.requests))]
    said = record["infos"][rids[2]]["kv_prefix"]
    assert said == {"name": "a", "length": 15, "budget": 8, "judge": "policy"}
    assert record["infos"][rids[3]]["kv_prefix"] == [said]

    def saying(index, value):
        info = {**record["infos"].get(rids[index], {}), "kv_prefix": value}
        return spoiled(record, infos={**record["infos"], rids[index]: info})

    def ending(index, message):
        end = {"type": "abort", "message": message, "status_code": 400}
        output = {**record["outputs"][rids[index]], "finish_reason": end, "output_ids": []}
        infos = {rid: info for rid, info in record["infos"].items() if rid != rids[index]}
        return spoiled(record, outputs={**record["outputs"], rids[index]: output}, infos=infos)

    tokens = list(record["outputs"][rids[2]]["output_ids"])
    other = {**record["outputs"][rids[2]], "output_ids": [*tokens[:-1], tokens[-1] + 1]}
    for wrong in (
        *[saying(index, None) for index in (0, 2, 3, 4)],
        *[saying(index, {**said, "length": 14}) for index in (0, 1, 2)],
        *(saying(3, []), saying(3, [said, {**said, "name": "b"}]), saying(4, {"deleted": "b"}), saying(5, said)),
        *[ending(index, "kv_prefix 'a' is unknown here: create it first") for index in (2, 4)],
        *(ending(2, "kv_prefix 'a' was deleted while the request waited"), ending(0, "kv_prefix 'a' is there already")),
        *(ending(0, "kv_prefix 'a' does not fit the KV pool of 128"), ending(3, "for no reason")),
        spoiled(record, outputs={**record["outputs"], rids[2]: other}),
        spoiled(record, flushes=[3]),
    ):
        assert check(schedule, wrong).problems, wrong


def test_who_outgrew_the_pool_comes_back_from_a_copy_and_is_compared(runs):
    schedule, record = runs[1]
    counts = check(schedule, record).counts
    assert (counts["copied at a retraction"], counts["copied at a pause"]) == (1, 2)
    assert counts["compared after a restore"] == record["stats"]["requests_restored"] - 1 == 2
    rid = rid_of(record["number"], 0)
    for field in ("copied", "must_copy"):
        places = [{**place, field: not place[field]} for place in record["retractions"][rid]]
        assert check(schedule, spoiled(record, retractions={**record["retractions"], rid: places})).problems, field


def test_a_failing_schedule_is_made_as_small_as_it_can_be(rng):
    """Here a schedule fails that has a pause, and a follow-up of a request with a prompt of three tokens or more."""

    def fails(schedule: Schedule) -> bool:
        has_pause = any(event.kind == "pause_retract" for event in schedule.events)
        before = [schedule.requests[request.after] for request in schedule.requests if request.after is not None]
        return has_pause and any(len(request.prompt) >= 3 for request in before)

    base = schedule_of(rng.randrange(10**6))
    extra = (FuzzRequest(prompt=PROMPT, max_new_tokens=40), FuzzRequest(prompt=(5,), max_new_tokens=9, after=0))
    moved = [dataclasses.replace(one, after=None if one.after is None else one.after + 2) for one in base.requests]
    events = (*base.events, Event(at_pass=9, kind="pause_retract"))
    schedule = dataclasses.replace(base, requests=(*extra, *moved), events=events)
    small = shrink(schedule, lambda some: [fails(one) for one in some], tell=lambda line: None)
    assert fails(small)
    assert [len(request.prompt) <= 5 for request in small.requests] == [True, True]
    assert [event.kind for event in small.events] == ["pause_retract"]
    assert small.requests[1].after == 0 and small.server == schedule.server


def test_an_answer_that_was_cut_off_is_judged_by_its_own_limit(rng):
    """A head start comes only where a request may outgrow its capacity, however few tokens came out of it."""
    server, limit = dataclasses.replace(SERVER, stagger=True, buffer=20), 60
    wrong = 0
    for _ in range(4):
        request = FuzzRequest(prompt=tuple(random_ids(rng, 9)), max_new_tokens=limit)
        right = expected_of(server, request, list(request.prompt), limit, [])
        asked = {"prompt": list(request.prompt), "prompt_len": len(request.prompt)}
        cut = {"output_ids": right.output_ids[:27], "finish_reason": {"type": "abort"}, "info": None}
        assert compare_oracle(server, request, {**cut, **asked}, [], Counter()) == []
        wrong += expected_of(server, request, list(request.prompt), 27, []).output_ids != cut["output_ids"]
    assert wrong > 0, "no head start changed a token"


def test_a_chunk_that_gets_back_what_the_chunk_before_it_shared_is_no_change():
    """The tree has the first page of the second prompt already, and its second page lies where the first one was."""
    server = dataclasses.replace(
        SERVER, granularity="request", budget=24, buffer=16, page_size=16, chunk_size=32, pool=176, max_running=3
    )
    prompt = tuple(range(20, 44))
    requests = tuple(FuzzRequest(prompt=own, max_new_tokens=9) for own in (prompt, (7,), prompt, prompt))
    schedule = Schedule(seed=0, server=server, requests=requests)
    (record,) = run_schedules([schedule])
    assert check(schedule, record).problems == []
