"""What the comparison of frontend programs counts as the same structure, on hand-made runs."""

import json
import re
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from benchmarks.common.schema import write_table
from benchmarks.common.tables import FRONTEND
from benchmarks.frontend.programs import all_programs
from benchmarks.frontend.report import markdown, plot
from benchmarks.frontend.rows import frontend_rows
from benchmarks.frontend.run import Call, ProgramRun, RecordingEndpoint, compared_hits, structure_differences

CHOICES = {"mood": ("good", "bad")}


def call(prompt: str, answer: str, cached: int = 0, compactions: int = 0) -> Call:
    return Call(prompt, answer, len(prompt), cached, len(answer), compactions)


def run(calls: Sequence[Call], mood: str = "good", **texts: str) -> ProgramRun:
    return ProgramRun({**texts, "mood": mood}, {"mood": mood}, calls)


# Without a policy the second request finds all of the first one, and the third only what the first two share.
NONE = run([call("ab", "cd"), call("abcd.", "ef", cached=4), call("abx", "y", cached=2)], first="cd", second="ef")
# Compacted in the first answer, which therefore is not in the cache; its text happens to be the same.
RKV = run(
    [call("ab", "cd", compactions=2), call("abcd.", "eg", cached=2), call("abx", "y", cached=2)],
    first="cd",
    second="eg",
)


def test_hits_behind_a_compacted_answer_are_not_compared() -> None:
    assert compared_hits(NONE, RKV) == [(0, 0), (2, 2)]
    assert compared_hits(NONE, NONE) == [(0, 0), (4, 4), (2, 2)]
    assert structure_differences(NONE, RKV, CHOICES) == []


def test_a_prompt_of_both_runs_is_compared_run_by_run() -> None:
    theirs = run([call("ab", "c"), call("ab", "c", cached=1)])
    assert compared_hits(theirs, theirs) == [(0, 0), (1, 1)]
    assert compared_hits(theirs, run([call("ab", "c"), call("ab", "c", cached=2)])) == [(0, 0), (1, 2)]
    # A request more than the other server had has nothing to be compared with.
    assert compared_hits(run(theirs.calls[:1]), theirs) == [(0, 0)]


def test_hits_of_requests_that_race_are_not_compared() -> None:
    def forked(cached: int, again: int) -> ProgramRun:
        calls = [call("ab", "c"), call("abx", "c", cached=cached), call("ab", "c", cached=1), call("abx", "c", again)]
        return ProgramRun({"first": "c"}, {}, calls, num_racing=2)

    assert compared_hits(forked(0, 2), forked(2, 2)) == [(1, 1), (2, 2)]
    assert structure_differences(forked(0, 2), forked(2, 2), {}) == []
    (line,) = structure_differences(forked(0, 2), forked(2, 1), {})
    assert "prefix hits differ for 1" in line


@pytest.mark.parametrize(
    "ours, told",
    [
        (run(RKV.calls, first="cd"), "other variables: \\['second'\\]"),
        (run(RKV.calls[:2], first="cd", second="eg"), "2 requests instead of 3"),
        (run(RKV.calls, "awful", first="cd", second="eg"), "mood is 'awful'"),
        (
            run([*RKV.calls[:2], call("abx", "y", cached=1)], first="cd", second="eg"),
            "prefix hits differ for 1 of the same prompts",
        ),
        (run(NONE.calls, first="cd", second="other"), "although nothing was compacted"),
    ],
)
def test_each_difference_is_told(ours: ProgramRun, told: str) -> None:
    (line,) = structure_differences(NONE, ours, CHOICES)
    assert re.search(told, line), line


def test_rows_by_hand(tmp_path: Path) -> None:
    none, rkv = frontend_rows({"turns": NONE}, {"turns": RKV}, 64, 16)
    expected: dict[str, Any] = {
        "program": "turns",
        "setting": "rkv",
        "budget": 64,
        "buffer": 16,
        "variables": 3,
        "equal_texts": 2,
        "choices": "good",
        "calls": 3,
        "compressed": 1,
        "compactions": 2,
        "output_tokens": 5,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "compared_calls": 2,
        "compared_cached_tokens": 2,
    }
    assert rkv == expected
    same = {"setting": "none", "budget": 0, "buffer": 0, "equal_texts": 3, "compressed": 0, "compactions": 0}
    assert none == {**expected, **same, "cached_tokens": 6}
    write_table(tmp_path, FRONTEND, [none, rkv], {})
    assert plot(tmp_path).stat().st_size > 5000
    assert "| turns | 3 | 2 | 3/3 | 1 | 2 | 6/4 | 2/2 |" in markdown([none, rkv])


def test_a_row_has_the_hits_of_its_own_server() -> None:
    fewer = run([*RKV.calls[:2], call("abx", "y", cached=1)], first="cd", second="eg")
    none, rkv = frontend_rows({"turns": NONE}, {"turns": fewer}, 64, 16)
    assert (none["compared_cached_tokens"], rkv["compared_cached_tokens"]) == (2, 1)


def test_half_of_the_programs_are_compacted() -> None:
    names = [program.name for program in all_programs(64, 16)]
    assert len(set(names)) == 6 and sum(name.endswith("_long") for name in names) == 3


class Model(BaseHTTPRequestHandler):
    """Answers with a model's name."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"model_path": "a-model"}).encode())

    def log_message(self, *args: Any) -> None:
        pass


def test_the_server_is_reached_without_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        # To be set, and put back.
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), Model) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert RecordingEndpoint(f"http://127.0.0.1:{server.server_port}").get_model_name() == "a-model"
        finally:
            server.shutdown()
