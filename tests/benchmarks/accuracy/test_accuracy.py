"""The accuracy benchmark without a model: what counts as right, what is kept, and what the figures mean."""

import contextlib
import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.accuracy.__main__ import make_store, measure, parse_arguments, sampling_of
from benchmarks.accuracy.checker import Verdict, check, compare
from benchmarks.accuracy.judge import Judge
from benchmarks.accuracy.kept import compare_answers
from benchmarks.accuracy.problems import DRY_RUN_PROBLEMS, Problem, load_problems
from benchmarks.accuracy.report import markdown, plot
from benchmarks.accuracy.rows import (
    NOTHING_COMPRESSED,
    PARTLY_COMPRESSED,
    accuracy_rows,
    busy_seconds,
    control_of,
    paired,
)
from benchmarks.accuracy.run import Sampling, run_samples
from benchmarks.accuracy.store import Sample, SampleStore
from benchmarks.common.schema import write_table
from benchmarks.common.settings import Setting, parse_setting
from benchmarks.common.statistics import Estimate
from benchmarks.common.tables import ACCURACY
from devtools.launch import Server, ServerError

ROOT = Path(__file__).resolve().parents[3]
NONE, RKV = parse_setting("none"), parse_setting("rkv:64:16")
CONTROL = parse_setting("random_attention:64:16:granularity=head:window=8")
SAMPLING = Sampling(instruction="Box it.", temperature=0.6, top_p=0.95, max_tokens=64, seed=0)


def make_sample(problem: str = "p", sample: int = 0, **changed: Any) -> Sample:
    fields: dict[str, Any] = {
        "outcome": "wrong",
        "found": "",
        "prompt_tokens": 10,
        "output_tokens": 20,
        "finish_reason": "stop",
        "compactions": 0,
        "evicted_tokens": 0,
        "start": 0.0,
        "end": 1.0,
        "devices": 1,
        "text": "two\nlines",
    }
    return Sample(problem=problem, sample=sample, **{**fields, **changed})


@pytest.mark.parametrize(
    "text, answer, outcome",
    [
        ("So we get \\boxed{540}.", "540", "right"),
        ("So we get \\boxed{541}.", "540", "wrong"),
        ("The answer is 42.", "42", "right"),
        ("The numbers 3 and 42 occur; the final answer is $\\frac{84}{2}$.", "42", "right"),
        ("\\boxed{025}", "25", "right"),
        ("\\boxed{1,234}", "1234", "right"),
        ("\\boxed{0.25}", "\\frac{1}{4}", "right"),
        ("\\boxed{\\dfrac14}", "\\frac{1}{4}", "right"),
        ("\\boxed{(3, \\pi/2)}", "\\left( 3, \\frac{\\pi}{2} \\right)", "right"),
        ("\\boxed{(\\pi/2, 3)}", "\\left( 3, \\frac{\\pi}{2} \\right)", "wrong"),
        ("\\boxed{q - p}", "p - q", "wrong"),
        ("\\boxed{-q + p}", "p - q", "right"),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", "right"),
        ("<think>Perhaps \\boxed{7}.</think>It is \\boxed{8}.", "8", "right"),
        ("Perhaps \\boxed{7}, no, wait.</think>It is \\boxed{8}.", "7", "wrong"),
        ("<think>It is \\boxed{7}.</think>I cannot say.", "7", "none"),
        ("I do not know.", "42", "none"),
        ("", "42", "none"),
    ],
)
def test_answers_are_compared_by_value(text: str, answer: str, outcome: str) -> None:
    assert check(text, answer).outcome == outcome


def test_a_number_before_a_cut_is_no_answer_but_a_boxed_one_is() -> None:
    assert check("Then we add 42", "42", truncated=True).outcome == "none"
    assert check("It is \\boxed{42}. Let me check that", "42", truncated=True).outcome == "right"


def test_a_known_answer_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        check("\\boxed{1}", "")


@pytest.mark.parametrize(
    "text, full_text, expected",
    [
        ("\\boxed{0.25}", "So it is \\boxed{\\frac{1}{4}}.", "same"),
        ("The answer is 42.", "The answer is 43.", "other"),
        ("The answer is 42.", "I cannot say.", "other"),
        ("I cannot say.", "The answer is 42.", "other"),
        ("I cannot say.", "", "neither"),
    ],
)
def test_final_answers_of_two_outputs_are_compared_by_value(text: str, full_text: str, expected: str) -> None:
    assert compare(text, False, full_text, False) == expected


def test_an_answer_kept_may_be_cut_where_it_is_boxed() -> None:
    assert compare("Then we add 42", True, "Then we add 42", False) == "other"
    assert compare("It is \\boxed{42}. Let", True, "It is 42", False) == "same"


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(cpu_seconds=1) as judge:
        yield judge


# Python multiplies for hours, and hears no signal meanwhile.
ENDLESS = r"\boxed{9^{9^{9^{9}}}}"


def test_the_judge_says_what_the_checker_says(judge: Judge) -> None:
    questions = [(r"\boxed{540}", "540"), (r"\boxed{1}", "2"), ("no", "2"), (r"\boxed{\text{ü}}", r"\text{ü}")]
    for text, answer in questions:
        assert judge.verdict(text, answer) == check(text, answer)
    assert judge.verdict("Then we add 42", "42", truncated=True).outcome == "none"


def test_an_answer_without_end_is_unjudged_and_the_next_is_judged(judge: Judge) -> None:
    assert judge.verdict(ENDLESS, "3") == Verdict("unjudged", "")
    assert judge.verdict("\\boxed{3}", "3").outcome == "right"


def test_answers_of_two_outputs_are_compared_in_time_or_not_at_all(judge: Judge) -> None:
    assert judge.compare(ENDLESS, False, "\\boxed{3}", False) == "unjudged"
    assert judge.compare("\\boxed{3}", False, "It is 3.", True) == "other"
    assert judge.compare("\\boxed{3}", False, "It is 3.", False) == "same"


def test_a_long_number_is_an_answer_like_any_other(judge: Judge) -> None:
    assert judge.verdict("\\boxed{10^{5000}}", "3").outcome == "wrong"


def test_what_the_checker_spends_on_others_does_not_count(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine the clock runs and the process does not.
    judge.require("42")
    assert judge._process is not None
    judge._process.send_signal(signal.SIGSTOP)
    timer = threading.Timer(2.5, judge._process.send_signal, [signal.SIGCONT])
    timer.start()
    assert judge.verdict("\\boxed{42}", "42").outcome == "right"
    timer.join()


def test_known_answers_are_read_at_the_start_or_refused_in_one_line(judge: Judge) -> None:
    judge.require("\\frac{1}{2}")
    with pytest.raises(ValueError, match=r"^the known answer '' cannot be read$"):
        judge.require("")


def test_without_the_checkers_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with Judge() as judge, pytest.raises(ModuleNotFoundError, match="pip install 'math-verify"):
        judge.require("1")


def test_answers_of_every_known_problem_are_right_and_those_of_the_others_wrong() -> None:
    problems = load_problems(str(DRY_RUN_PROBLEMS))
    assert 4 <= len(problems) <= 8
    for problem in problems:
        for other in problems:
            outcome = check(f"Therefore \\boxed{{{other.answer}}}", problem.answer).outcome
            assert outcome == ("right" if other == problem else "wrong")


def test_the_last_of_gsm8k_is_the_answer_and_fields_may_be_capitals(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(
        '{"question": "How many?", "answer": "6 * 7 = <<6*7=42>>42\\n#### 1,042"}\n\n{"Problem": "x?", "Answer": 33}\n'
    )
    assert load_problems(str(path)) == [Problem("How many?", "1,042"), Problem("x?", "33")]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"problem": "x"}', "record 1: needs the fields"),
        ('{"problem": "x", "answer": "1"}\n{"problem": "x", "answer": "1"}', "same problem twice"),
        ("no JSON", "line 1 is no JSON"),
        ("[1]", "no JSON object"),
        ('{"problem": "x", "answer": "#### "}', "answer is empty"),
        ("", "no problems"),
    ],
)
def test_bad_problems_are_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_problems(str(path))
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_no_data_set_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        load_problems(str(tmp_path / "gone.jsonl"))


def test_a_data_set_of_the_hub_needs_its_package_and_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_problems("openai/gsm8k")
    asked = []

    def load_dataset(name: str, subset: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, subset, split))
        if subset is None:
            raise RuntimeError("Config name is missing.\nPlease pick one.")
        return [{"question": "How many?", "answer": "Two.\n#### 2"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_problems("openai/gsm8k", "train", "main") == [Problem("How many?", "2")]
    assert asked == [("openai/gsm8k", "main", "train")]
    with pytest.raises(ValueError, match=r"could not be loaded: Config name is missing\.$"):
        load_problems("openai/gsm8k")


def test_settings_are_read_and_become_flags() -> None:
    none = parse_setting("none")
    assert none == Setting("none") and none.flags == ()
    assert (none.name, none.policy, none.budget, none.buffer) == ("none", "none", 0, 0)
    setting = parse_setting("snapkv:1024:128")
    assert setting.name == "snapkv:1024:128"
    assert (setting.policy, setting.budget, setting.buffer) == ("snapkv", 1024, 128)
    assert setting.flags == ("--kv-policy", "snapkv", "--kv-budget", "1024", "--kv-buffer", "128")
    for wrong in ("", "rkv", "rkv:1024", "rkv:a:b", "rkv:1:2:3", "none:1:2", ":1:2"):
        with pytest.raises(ValueError, match="neither none nor"):
            parse_setting(wrong)


def test_a_setting_may_name_all_that_a_server_takes() -> None:
    text = "rkv:64:16:window=32:mix_lambda=0.25:stagger=true"
    setting = parse_setting(text)
    assert setting.name == text and setting.config is not None
    assert (setting.config.window, setting.config.mix_lambda, setting.config.stagger) == (32, 0.25, True)
    assert setting.flags[6:] == ("--kv-window", "32", "--rkv-mix-lambda", "0.25", "--kv-stagger")
    seeded = parse_setting("random:64:16:seed=7")
    assert seeded.flags[6:] == ("--kv-policy-config", '{"seed": 7}')
    # What a policy has of its own accord needs no flag, and is known.
    own = parse_setting("gkv:64:16")
    assert own.config is not None and own.config.window == 16 and len(own.flags) == 6
    for wrong in ("rkv:64:16:window", "rkv:64:16:window=a", "rkv:64:16:seed=7", "rkv:64:16:window=64", "none:window=8"):
        with pytest.raises(ValueError, match="neither none nor"):
            parse_setting(wrong)


def test_a_difference_that_problems_agree_on_is_seen_where_two_shares_apart_tell_nothing() -> None:
    """Of 100 problems 50 are solved by both and 10 by ours alone: 0.1 of them, and no problem says otherwise.

    The number of these 10 among 100 drawn with replacement is binomial, with 2.5 and 97.5 % at 5 and 16. As two samples
    that know nothing of each other, 60 and 50 of 100 have a difference of 0.1 with a deviation of 0.07.
    """
    ours, theirs = [1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50
    assert paired(ours, theirs) == Estimate(pytest.approx(0.1), pytest.approx(0.05), pytest.approx(0.16))
    # The same shares of other problems: 50 say yes, 40 no.
    apart = paired(ours, theirs[::-1])
    assert apart.mean == pytest.approx(0.1) and apart.low < 0 < apart.high
    assert paired([0.5, 1.0, 0.0], [0.25, 0.75, -0.25]) == Estimate(0.25, 0.25, 0.25)
    assert math.isnan(paired([1.0], None).mean)


def test_samples_come_back_and_a_cut_line_is_made_again(tmp_path: Path, rng: random.Random) -> None:
    store = SampleStore(tmp_path, "rkv:64:16", {"model": "m"})
    samples = [make_sample(f"p{i}", i % 2, output_tokens=rng.randrange(99)) for i in range(4)]
    for sample in samples:
        store.add(sample)
    assert list(SampleStore(tmp_path, "rkv:64:16", {"model": "m"}).samples.values()) == samples
    content = store.path.read_text()
    last = content.splitlines(keepends=True)[-1]
    for length in (1, rng.randrange(1, len(last)), len(last) - 1):
        store.path.write_text(content[: len(content) - len(last) + length])
        cut = SampleStore(tmp_path, "rkv:64:16", {"model": "m"})
        assert list(cut.samples.values()) == samples[:-1]
        # Another process may be writing it.
        assert store.path.stat().st_size == len(content) - len(last) + length
        cut.add(samples[-1])
        assert store.path.read_text() == content


def test_what_is_there_so_far_is_of_the_problems_that_all_have_answered(
    tmp_path: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["accuracy", "--answered", "--settings", "none,rkv:64:16", "--work", str(tmp_path)]
    )
    options = parse_arguments()
    options.samples = 2
    problems = [Problem(f"say {i}", "3") for i in range(3)]
    with pytest.raises(ValueError, match="no problem has been answered under every setting"):
        measure(options, problems, judge)
    for setting, answered in ((NONE, (0, 1, 2)), (RKV, (2, 0))):
        store = make_store(options, setting, sampling_of(options))
        for i in answered:
            for number in range(2 if i else 1 + (setting == NONE)):
                store.add(make_sample(problems[i].key, number))
    results = measure(options, problems, judge)
    assert {setting: list(by_problem) for setting, by_problem in results.items()} == {
        NONE: [problems[2].key],
        RKV: [problems[2].key],
    }


def test_another_setting_has_another_file_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    SampleStore(tmp_path, "none", {"max_tokens": 64}).add(make_sample())
    assert SampleStore(tmp_path, "none", {"max_tokens": 65}).samples == {}
    store = SampleStore(tmp_path, "none", {"max_tokens": 64})
    store.path.write_text("{}\n" + store.path.read_text().partition("\n")[2])
    with pytest.raises(ValueError, match="not written by this benchmark"):
        SampleStore(tmp_path, "none", {"max_tokens": 64})
    store.path.unlink()
    SampleStore(tmp_path, "none", {"max_tokens": 64}).path.open("a").write('{"problem": "p"}\n')
    with pytest.raises(ValueError, match="line 2 is no sample"):
        SampleStore(tmp_path, "none", {"max_tokens": 64})


def test_only_time_with_a_sample_under_way_counts() -> None:
    spans = [(10, 14), (11, 12), (13, 16), (100, 101), (16, 17)]
    assert busy_seconds(make_sample(start=a, end=b) for a, b in spans) == 7 + 1
    assert busy_seconds([]) == 0


def test_figures_by_hand() -> None:
    none = {
        "a": [make_sample("a", i, outcome="right", output_tokens=100, end=9.0) for i in range(4)],
        "b": [make_sample("b", i, outcome="wrong", output_tokens=300, end=9.0) for i in range(4)],
    }
    outcomes = {"a": ["right", "right", "wrong", "none"], "b": ["right", "wrong", "wrong", "wrong"]}
    rkv = {
        name: [
            make_sample(name, i, outcome=outcome, output_tokens=400, compactions=3 * (name == "a"), end=4.0, devices=2)
            for i, outcome in enumerate(of_one)
        ]
        for name, of_one in outcomes.items()
    }
    rkv["b"][0] = make_sample(
        "b", outcome="right", output_tokens=400, finish_reason="length", start=14.0, end=18.0, devices=2
    )
    first, second = accuracy_rows("some", {NONE: none, RKV: rkv})
    assert (first["pass_at_1"], second["pass_at_1"]) == (0.5, (0.5 + 0.25) / 2)
    assert (second["pass_at_1_low"], second["pass_at_1_high"]) == (0.25, 0.5)
    assert (second["problems"], second["samples"], second["devices"]) == (2, 4, 2)
    assert (second["no_answer"], second["truncated"], second["compressed"]) == (1 / 8, 1 / 8, 1 / 2)
    assert (second["compactions"], second["tokens_mean"]) == (1.5, 400)
    assert (second["seconds"], second["correct_per_hour"]) == (8, 3 * 3600 / (8 * 2))
    # Problem by problem: 0.5 - 1 and 0.25 - 0.
    assert (second["pass_diff"], second["pass_diff_low"], second["pass_diff_high"]) == (-0.125, -0.5, 0.25)
    assert (second["tokens_diff"], second["tokens_diff_low"], second["tokens_diff_high"]) == (200, 100, 300)
    assert first["pass_diff"] == first["tokens_diff"] == 0


def test_every_problem_counts_for_the_answers_that_are_kept(judge: Judge) -> None:
    """By hand: of five problems the full cache answers four. One setting keeps two of these and fails at the fifth, as
    the full cache does, which counts as kept; the control keeps one, and answers the fifth."""

    def answers(*texts: str, **changed: Any) -> dict[str, list[Sample]]:
        return {
            str(i): [
                make_sample(str(i), text=text, found=text[-1], outcome="wrong" if text != "?" else "none", **changed)
            ]
            for i, text in enumerate(texts)
        }

    results = {
        NONE: answers("It is 1", "It is 2", "It is 3", "It is 4", "?"),
        RKV: answers("So 1.0", "It is 2", "It is 4", "?", "?", evicted_tokens=15),
        CONTROL: answers("It is 9", "It is 9", "It is 3", "It is 9", "It is 1", evicted_tokens=10),
    }
    kept = {setting: compare_answers(judge, by_problem, results[NONE]) for setting, by_problem in results.items()}
    assert [of_one for (of_one,) in kept[RKV].values()] == ["same", "same", "other", "other", "neither"]
    full, ours, control = accuracy_rows("some", results, kept)
    assert [(row["kept"], row["kept_neither"]) for row in (full, ours, control)] == [(1, 0.2), (0.6, 0.2), (0.2, 0)]
    # Problem by problem 1, 1, -1, 0, 1.
    assert ours["kept_less_control"] == 0.4 and ours["kept_less_control_low"] < 0 < ours["kept_less_control_high"]
    assert (ours["control"], control["control"], control["kept_less_control"]) == (CONTROL.name, CONTROL.name, 0)
    assert full["control"] == "" and math.isnan(float(full["kept_less_control"]))
    assert [row["held"] for row in (full, ours, control)] == [1, 0.25, 0.5]
    against_ours = accuracy_rows("some", results, kept, RKV.name)
    assert [row["kept_less_control"] for row in against_ours] == [0.4, 0, -0.4]
    assert f"Control: {RKV.name}." in markdown(against_ours, "GPU", RKV.name)
    assert "Control: random_attention of the same budget." in markdown([full, ours, control], "GPU")
    unjudged = {setting: {key: ["unjudged"] for key in of_one} for setting, of_one in kept.items()}
    assert [(row["kept"], row["not_compared"]) for row in accuracy_rows("some", results, unjudged)] == [(0, 1)] * 3


def test_a_draw_of_the_same_budget_is_the_control() -> None:
    names = ("none", "random_attention:64:16:granularity=head:window=8", "random_attention:64:16:window=8", "rkv:48:16")
    settings = [parse_setting(name) for name in names]
    assert control_of(RKV, settings) == settings[1]
    assert control_of(parse_setting("rkv:64:16:granularity=request"), settings) == settings[2]
    assert control_of(RKV, [settings[0], settings[2]]) == settings[2]
    other = parse_setting("random_attention:64:16:granularity=head:window=9")
    assert control_of(RKV, [other, *settings]) == settings[1]
    assert control_of(settings[3], settings) is None and control_of(NONE, settings) is None


def test_a_named_control_is_one_setting_or_a_variant_at_every_budget() -> None:
    names = ("none", "rkv:64:16", "rkv:80:16", "rkv:64:16:window=9", "rkv:80:16:window=9", "rkv:80:32:window=9")
    settings = dict(zip(names, map(parse_setting, names), strict=True))

    def control(name: str, named: str) -> str | None:
        found = control_of(settings[name], list(settings.values()), named)
        return found and found.name

    assert {control(name, "rkv:80:16") for name in names} == {"rkv:80:16"}
    assert [control(name, "rkv:window=9") for name in names] == [None, *names[3:5], *names[3:]]
    assert [control(name, "rkv") for name in names] == [None, *names[1:3], *names[1:3], None]


def test_rows_say_when_they_prove_nothing(tmp_path: Path) -> None:
    def row(compactions: list[int]) -> dict[str, Any]:
        samples = {"p": [make_sample(sample=i, compactions=count) for i, count in enumerate(compactions)]}
        (only,) = accuracy_rows("some", {RKV: samples})
        return only

    assert [row(counts)["note"] for counts in ([0, 0], [1, 0, 0], [1, 0], [2, 1])] == [
        NOTHING_COMPRESSED,
        PARTLY_COMPRESSED,
        "",
        "",
    ]
    alone = row([0])
    assert math.isnan(float(alone["pass_diff"])) and NOTHING_COMPRESSED in markdown([alone], "GPU")
    (baseline,) = accuracy_rows("some", {NONE: {"p": [make_sample()]}})
    assert baseline["note"] == ""
    (unjudged,) = accuracy_rows("some", {NONE: {"p": [make_sample(outcome="unjudged"), make_sample()]}})
    assert (unjudged["unjudged"], unjudged["pass_at_1"]) == (0.5, 0)
    assert unjudged["note"] == "1 samples could not be judged"
    write_table(tmp_path, ACCURACY, [baseline, alone], {})
    assert plot(tmp_path).stat().st_size > 5000


class _Answers(BaseHTTPRequestHandler):
    """Stands for a server: answers with the last number of the question, and refuses once told to."""

    asked: list[dict[str, Any]]
    refuse_after: int
    # So many are answered at once, the others when it may go on.
    answer_after: int
    go_on: threading.Event
    content: str

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if len(self.asked) > self.answer_after:
            self.go_on.wait()
        refused = len(self.asked) > self.refuse_after
        number = body["messages"][0]["content"].split()[1]
        answer = {
            "choices": [
                {
                    "message": {"content": self.content or f"\\boxed{{{number}}}"},
                    "finish_reason": "stop",
                    "meta_info": {"kv_compactions": 2, "kv_evicted_tokens": 32},
                }
            ],
            "usage": {"prompt_tokens": 5, "completion_tokens": 7},
        }
        content = json.dumps({"message": "no more"} if refused else answer).encode()
        # Who asked may have ended.
        with contextlib.suppress(OSError):
            self.send_response(500 if refused else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Server, type[_Answers]]]:
    answers = type("Answers", (_Answers,), {"asked": [], "refuse_after": 10**9, "answer_after": 10**9, "content": ""})
    answers.go_on = threading.Event()
    http = ThreadingHTTPServer(("127.0.0.1", 0), answers)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{http.server_address[1]}"
    yield Server(url=url, process=None, log_path=tmp_path / "log"), answers  # type: ignore[arg-type]
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_run_goes_on_behind_an_interruption(
    tmp_path: Path, server: tuple[Server, type[_Answers]], judge: Judge
) -> None:
    launched, answers = server
    wanted = [(Problem(f"say {i} now", "3"), sample) for sample in range(2) for i in range(5)]
    store = SampleStore(tmp_path, "none", {})
    answers.refuse_after = 4
    with pytest.raises(ServerError, match=r"refused a request: .*no more"):
        run_samples(launched, store, wanted, SAMPLING, 1, 60, judge)
    assert len(store.samples) == 4
    answers.refuse_after = 10**9
    store = SampleStore(tmp_path, "none", {})
    todo = [(problem, sample) for problem, sample in wanted if (problem.key, sample) not in store.samples]
    run_samples(launched, store, todo, SAMPLING, 3, 60, judge)
    assert set(store.samples) == {(problem.key, sample) for problem, sample in wanted}
    # One was refused, and no finished one was asked for again.
    assert len(answers.asked) == 4 + 1 + 6
    right = [sample.outcome for (key, _), sample in store.samples.items() if key == Problem("say 3 now", "3").key]
    assert right == ["right"] * 2 and [s.outcome for s in store.samples.values()].count("wrong") == 8
    assert {(s.compactions, s.evicted_tokens, s.output_tokens) for s in store.samples.values()} == {(2, 32, 7)}
    body = answers.asked[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["return_meta_info"]) == (0.6, 0.95, 64, True)
    assert body["messages"] == [{"role": "user", "content": "say 0 now\n\nBox it."}]


SIGTERM_SCRIPT = """
import sys
from pathlib import Path
from benchmarks.accuracy.judge import Judge
from benchmarks.accuracy.problems import Problem
from benchmarks.accuracy.run import Sampling, run_samples
from benchmarks.accuracy.store import SampleStore
from devtools.launch import Server, exit_on_first_signal

exit_on_first_signal()
server = Server(url=sys.argv[1], process=None, log_path=Path("log"))
sampling = Sampling(instruction="", temperature=0, top_p=1, max_tokens=1, seed=0)
todo = [(Problem(f"say {i} now", "3"), 0) for i in range(9)]
with Judge(cpu_seconds=600) as judge:
    run_samples(server, SampleStore(Path(sys.argv[2]), "x", {}), todo, sampling, 3, 7200, judge)
"""


@pytest.mark.parametrize("busy", ["requests", "checker"])
def test_sigterm_ends_a_run_with_requests_under_way_and_an_answer_being_judged(
    tmp_path: Path, server: tuple[Server, type[_Answers]], busy: str
) -> None:
    launched, answers = server
    answers.answer_after = 0 if busy == "requests" else 1
    answers.content = ENDLESS
    command = [sys.executable, "-c", SIGTERM_SCRIPT, launched.url, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            while len(answers.asked) < 3 + answers.answer_after:
                assert run.poll() is None
                time.sleep(0.05)
            while busy == "checker" and not psutil.Process(run.pid).children():
                time.sleep(0.05)
            children = psutil.Process(run.pid).children()
            run.terminate()
            # Nobody answers before this ends.
            assert run.wait(30) == 128 + signal.SIGTERM
            assert not psutil.wait_procs(children, timeout=10)[1]
        finally:
            answers.go_on.set()
            run.kill()


def test_samples_of_a_problem_have_seeds_of_their_own() -> None:
    problems = [Problem("a", "1"), Problem("b", "1")]
    seeds = [SAMPLING.request(problem, sample)["seed"] for problem in problems for sample in range(8)]
    assert len(set(seeds)) == 16 and all(0 <= seed < 2**31 for seed in seeds)
    assert seeds[3] == SAMPLING.request(problems[0], 3)["seed"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--settings", "rkv:9"], "neither none"),
        (["--samples", "0"], "at least"),
        (["--control", "rkv:9:9"], "must be one of --settings"),
    ],
)
def test_bad_options_are_one_line(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", *flags])
    with pytest.raises(SystemExit) as ended:
        parse_arguments()
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
