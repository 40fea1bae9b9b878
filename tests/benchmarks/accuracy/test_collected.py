"""Answers that another machine collected: what a cut-off file keeps, who shares a server, and what is judged."""

import contextlib
import gzip
import json
import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy.answer_file import TOGETHER, AnswerFile, judge_answers, read_answers
from benchmarks.accuracy.collect import body_of, by_server
from benchmarks.accuracy.judge import Judge
from benchmarks.accuracy.problems import Problem
from benchmarks.accuracy.run import Sampling
from benchmarks.accuracy.store import Sample
from benchmarks.common.schema import read_table
from benchmarks.common.settings import parse_setting
from benchmarks.common.tables import ACCURACY, ACCURACY_POOLED
from tests.algorithm.cases import fresh_seed

NONE, RKV, LARGE = (parse_setting(name) for name in ("none", "rkv:64:16", "rkv:128:32"))
PROBLEMS = [Problem("One and one?", "2"), Problem("Two and two?", "4")]
INFO = {"date": "yesterday", "hardware": {"gpu": "some"}}


def answer(problem: Problem, text: str, **changed: Any) -> Sample:
    fields: dict[str, Any] = {
        "outcome": "unjudged",
        "found": "",
        "prompt_tokens": 5,
        "output_tokens": 20,
        "finish_reason": "stop",
        "compactions": 0,
        "evicted_tokens": 0,
        "start": 1.0,
        "end": 2.0,
        "devices": 1,
    }
    return Sample(problem=problem.key, sample=0, text=text, **{**fields, **changed})


def test_what_threads_wrote_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.gz"
    # What Python takes for an end of a line, too.
    texts = [f"{number}\u2028\x85 ü\r\n{{}}" for number in range(3 * TOGETHER + 1)]
    with AnswerFile(path, INFO) as file:
        threads = [
            threading.Thread(target=lambda own: [file.add(RKV, answer(PROBLEMS[0], text)) for text in own], args=(own,))
            for own in (texts[::2], texts[1::2])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    info, answers = read_answers(path)
    assert info == INFO and list(answers) == [RKV]
    assert sorted(sample.text for sample in answers[RKV]) == sorted(texts)


def test_a_file_cut_off_anywhere_keeps_all_but_its_last_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.gz"
    with AnswerFile(path, INFO) as file:
        for number in range(2 * TOGETHER):
            file.add(RKV, answer(PROBLEMS[0], str(number)))
    whole = path.read_bytes()
    rng = random.Random(fresh_seed())
    start = len(gzip.compress(json.dumps({"info": INFO}).encode() + b"\n"))
    for end in [start, len(whole) - 1, *(rng.randrange(start, len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:end])
        _, answers = read_answers(path)
        texts = [sample.text for sample in answers.get(RKV, [])]
        assert texts == [str(number) for number in range(len(texts))] and len(texts) % TOGETHER == 0
    assert len(texts) < 2 * TOGETHER


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"{}\n"), gzip.compress(b'{"info": {}}\n{"setting": "rkv:64:16"}\n')],
    # What is compressed has the time in it, and so would the names.
    ids=["empty", "text", "no info", "no sample"],
)
def test_another_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "answers.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="name another file") as refused:
        read_answers(path)
    assert "\n" not in str(refused.value)


def test_answers_are_judged_of_problems_that_all_settings_have_answered() -> None:
    one, two = PROBLEMS
    answers = {
        NONE: [answer(two, "\\boxed{4}"), answer(one, "\\boxed{3}")],
        RKV: [answer(two, "\\boxed{5", finish_reason="length")],
    }
    with Judge() as judge:
        judged = judge_answers(answers, PROBLEMS, judge)
        assert {s: list(by_problem) for s, by_problem in judged.items()} == {NONE: [two.key], RKV: [two.key]}
        assert [by_problem[two.key][0].outcome for by_problem in judged.values()] == ["right", "none"]
        with pytest.raises(ValueError, match="no problem has been answered under every setting"):
            judge_answers(answers, [one], judge)


def test_settings_share_a_server_if_only_budget_and_buffer_differ() -> None:
    names = ["none", "rkv:64:32", "rkv:64:32:window=16", "rkv:128:16", "h2o:64:32", "rkv:64:32:mix_lambda=0.3"]
    groups = by_server([parse_setting(name) for name in names])
    assert [[setting.name for setting in group] for group in groups] == [
        *(["none"], ["rkv:64:32", "rkv:128:16"]),
        *([name] for name in (names[2], names[4], names[5])),
    ]
    sampling = Sampling(instruction="", temperature=0, top_p=1, max_tokens=9, seed=0)
    assert body_of(LARGE, PROBLEMS[0], sampling)["custom_params"] == {"kv_budget": 128, "kv_buffer": 32}
    assert "custom_params" not in body_of(NONE, PROBLEMS[0], sampling)


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    path = tmp_path / "answers.gz"
    with AnswerFile(path, INFO) as file:
        for problem, text in zip(PROBLEMS, ("\\boxed{2}", "\\boxed{4}"), strict=True):
            file.add(LARGE, answer(problem, text, evicted_tokens=5, compactions=1))
            file.add(RKV, answer(problem, "\\boxed{2}", evicted_tokens=10, compactions=1))
            file.add(NONE, answer(problem, text))
    problems = [{"problem": problem.question, "answer": problem.answer} for problem in PROBLEMS]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


def run_main(monkeypatch: pytest.MonkeyPatch, collected: Path, *flags: str) -> int:
    problems = str(collected.with_name("problems.jsonl"))
    monkeypatch.setattr(sys, "argv", ["accuracy", "--collected", str(collected), "--problems", problems, *flags])
    return accuracy.main()


def test_the_table_says_what_was_measured_elsewhere(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, collected, "--out", str(tmp_path)) == 0
    rows = read_table(tmp_path, ACCURACY)
    assert [(row["setting"], row["pass_at_1"], row["kept"], row["held"]) for row in rows] == [
        *(("none", 1.0, 1.0, 1.0), ("rkv:64:16", 0.5, 0.5, 0.5), ("rkv:128:32", 1.0, 1.0, 0.75)),
    ]
    assert all(row[name] != row[name] for row in rows for name in ("seconds", "correct_per_hour"))
    info = json.loads((tmp_path / "accuracy.json").read_text())
    assert (
        info["hardware"] == {"gpu": "some"}
        and info["date"] == "yesterday"
        and "--collected" in info["judged"]["command"]
    )
    assert "-hour" not in capsys.readouterr().out


def test_variants_over_budgets_are_written_beside_the_table_and_never_left_from_another_run(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, collected, "--out", str(tmp_path), "--control", "rkv") == 0
    (row,) = read_table(tmp_path, ACCURACY_POOLED)
    assert (row["variant"], row["sizes"], row["control"]) == ("rkv", "64:16 128:32", "rkv")
    assert (row["kept"], row["pass_at_1"], row["held"], row["kept_less_control"]) == (0.75, 0.75, 0.625, 0)
    assert "| rkv | 64:16 128:32 | 0.750" in capsys.readouterr().out
    assert len(list(tmp_path.glob("accuracy_pooled.*"))) == 3
    assert run_main(monkeypatch, collected, "--out", str(tmp_path), "--settings", "none,rkv:64:16") == 0
    assert not list(tmp_path.glob("accuracy_pooled.*"))
    for given in ((), ("--settings", "none,rkv:64:16")):
        with contextlib.suppress(SystemExit):
            assert run_main(monkeypatch, collected, "--out", str(tmp_path), "--control", "rkv:window=9", *given) == 1
        assert "--control rkv:window=9 must be one of --settings, with or without" in capsys.readouterr().err


def test_settings_that_the_file_lacks_and_a_missing_folder_are_one_line(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, collected, "--out", str(tmp_path), "--settings", "none,h2o:64:16") == 1
    assert "has no answers of h2o:64:16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_main(monkeypatch, collected)
    assert "--collected needs --out" in capsys.readouterr().err
