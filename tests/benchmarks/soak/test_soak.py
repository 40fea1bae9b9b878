"""The soak without a model: growth is measured as it is, and no wrong answer, failed request or lost slot is missed."""

import json
import math
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.common.schema import Row, write_table
from benchmarks.common.statistics import slope_interval
from benchmarks.common.tables import SOAK
from benchmarks.soak.load import FIRST_ID, WAYS, Case, Load, ask_alone, make_cases
from benchmarks.soak.report import latency_slope, leaked_tokens, memory_slopes, plot, summary
from benchmarks.soak.watch import memory_mib, metrics
from devtools.launch import Server


def right_ids(body: dict[str, Any]) -> list[int]:
    """The answer of the stand-in: counting on from the last token of the prompt."""
    return [body["input_ids"][-1] + 1 + i for i in range(body["sampling_params"]["max_new_tokens"])]


class _Answers(BaseHTTPRequestHandler):
    """Stands for a server that answers, until it is told to go wrong."""

    wrong: str
    aborted: set[str]

    def do_GET(self) -> None:
        self._send(
            b'# HELP sglang:num_used_tokens x\nsglang:num_used_tokens{a="1"} 5.0\nsglang:num_used_tokens{a="2"} 7.0\n'
            b"sglang:num_used_tokens_other 100\nrkv:compactions_total 3.0\n"
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        if self.path == "/abort_request":
            self.aborted.add(body["rid"])
        if self.path != "/generate":
            return self._send(b"")
        ids = right_ids(body)
        if self.wrong == "token":
            ids[-1] += 1
        elif self.wrong == "first":
            ids[0] += 1
        if self.wrong == "refused":
            return self.send_error(503)
        if not body.get("stream"):
            return self._send(json.dumps({"output_ids": ids[: -1 if self.wrong == "short" else None]}).encode())
        lines = [f"data: {json.dumps({'output_ids': ids[: i + 1]})}\n\n" for i in range(len(ids))]
        if self.wrong == "short":
            del lines[-1]
        self._send("".join([*lines, "data: [DONE]\n\n"]).encode())

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Server, type[_Answers]]]:
    answers = type("Answers", (_Answers,), {"wrong": "", "aborted": set()})
    http = ThreadingHTTPServer(("127.0.0.1", 0), answers)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{http.server_address[1]}"
    yield Server(url=url, process=psutil.Process(), log_path=tmp_path / "log"), answers  # type: ignore[arg-type]
    http.shutdown()
    http.server_close()
    thread.join()


CASES = [Case(prompt=(1, 2, 100 * i), num_tokens=5, custom_params={}) for i in range(1, 5)]


def run(server: Server, load: Load, least: int) -> None:
    with load.running(3, 0):
        while sum(load.counts[way] for way in WAYS) + load.counts["errors"] < least:
            threading.Event().wait(0.01)


def test_right_answers_are_asked_for_in_every_way_and_none_is_complained_of(
    server: tuple[Server, type[_Answers]], seed: int
) -> None:
    launched, answers = server
    known = ask_alone(launched, CASES)
    assert known == [[100 * i + 1 + k for k in range(5)] for i in range(1, 5)]
    load = Load(launched, CASES, known, seed)
    run(launched, load, 150)
    assert all(load.counts[way] > 0 for way in WAYS) and answers.aborted
    assert (load.counts["mismatches"], load.counts["errors"], load.problems) == (0, 0, [])
    latencies, tokens = load.take()
    assert len(latencies) == load.counts["whole"] and tokens > 0
    assert load.take() == ([], 0)


@pytest.mark.parametrize("wrong", ["token", "first", "short"])
def test_an_answer_with_other_tokens_is_a_mismatch(
    server: tuple[Server, type[_Answers]], seed: int, wrong: str
) -> None:
    launched, answers = server
    load = Load(launched, CASES, ask_alone(launched, CASES), seed)
    answers.wrong = wrong
    run(launched, load, 60)
    whole = load.counts["whole"] + load.counts["stream"]
    # One that is cut off may have been right up to there.
    assert whole <= load.counts["mismatches"] <= whole + load.counts["abort"] + load.counts["leave"]
    assert wrong != "first" or load.counts["mismatches"] == sum(load.counts[way] for way in WAYS)
    assert "other tokens from number " in load.problems[0]


def test_a_request_that_fails_is_an_error(server: tuple[Server, type[_Answers]], seed: int) -> None:
    launched, answers = server
    load = Load(launched, CASES, ask_alone(launched, CASES), seed)
    answers.wrong = "refused"
    run(launched, load, 3)
    assert load.counts["errors"] >= 3 and "503" in load.problems[0]


def test_cases_differ_and_reach_both_sides_of_every_compaction(rng: random.Random) -> None:
    cases = make_cases(rng, 28, 64, 32)
    assert len(set(cases)) == 28
    assert {case.num_tokens for case in cases} >= {1, 96, 97, 129}
    assert {"kv_policy", "kv_budget"} <= {name for case in make_cases(rng, 60, 64, 32) for name in case.custom_params}
    assert all(min(case.prompt) >= FIRST_ID for case in cases)


def test_memory_and_metrics_are_read(server: tuple[Server, type[_Answers]]) -> None:
    found = memory_mib(server[0])
    assert found["main"] > 10
    seen = metrics(server[0])
    assert (seen["pool_tokens"], seen["compactions"], seen["queued"]) == (12, 3, 0)


def test_a_slope_is_that_of_the_line_and_its_interval_holds_it(rng: random.Random) -> None:
    exact = slope_interval([0, 1, 2, 5], [3, 5, 7, 13])
    assert exact.mean == pytest.approx(2) == exact.low == exact.high
    assert math.isnan(slope_interval([0, 1], [0, 1]).mean) and math.isnan(slope_interval([1, 1, 1], [1, 2, 3]).mean)
    held = 0
    for _ in range(20):
        xs = [rng.uniform(0, 1) for _ in range(40)]
        found = slope_interval(xs, [7 - 3 * x + rng.gauss(0, 1) for x in xs])
        held += found.low <= -3 <= found.high
    # It holds the slope in 93 of 100 draws, so 12 of 20 at least but once in 300,000 runs.
    assert held >= 12


def rows(growth_per_hour: float, leaked: int = 0) -> list[Row]:
    made: list[Row] = []
    for number in range(40):
        phase = "idle" if number % 4 == 3 else "load"
        seconds = 30.0 * number
        made.append(
            {
                "seconds": seconds,
                "phase": phase,
                **{f"pss_{role}_mib": 100.0 for role in ("main", "detokenizer", "other")},
                # While it fills its caches it grows anyway, and under load it goes up and down.
                "pss_scheduler_mib": 500
                + growth_per_hour * seconds / 3600
                + (90 if phase == "load" else 0)
                - max(0, 240 - seconds),
                **dict.fromkeys(("running", "queued", "retractions", "restored", "mismatches", "errors"), 0),
                "pool_tokens": leaked if phase == "idle" else 3000,
                "compactions": number,
                "latency_p50_ms": 10.0 if phase == "load" else float("nan"),
                "latency_p99_ms": 20.0 + seconds / 360 if phase == "load" else float("nan"),
                "tokens": 50,
                "requests": 10 * number,
            }
        )
    return made


def test_growth_is_that_of_the_idle_moments_behind_the_warm_up(tmp_path: Path) -> None:
    slopes = memory_slopes(rows(12.0))
    assert slopes["pss_scheduler_mib"].mean == pytest.approx(12) == slopes["all"].mean
    assert slopes["pss_main_mib"].mean == 0
    assert latency_slope(rows(0)).mean == pytest.approx(10)
    assert leaked_tokens(rows(0)) == 0 and leaked_tokens(rows(0, leaked=3)) == 3
    told = summary(rows(12.0, leaked=3))
    assert "memory of scheduler: +12.0 [+12.0, +12.0] MiB an hour" in told and "slots in use when idle: 3" in told
    write_table(tmp_path, SOAK, rows(12.0), {})
    assert plot(tmp_path).stat().st_size > 5000
