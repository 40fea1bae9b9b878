"""The benchmark of named prefixes on runs made by hand: its documents, its counts, its options, its report."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.schema import Row, write_table
from benchmarks.common.tables import PREFIX_LOAD, PREFIX_RECALL
from benchmarks.prefixes.__main__ import parse_arguments
from benchmarks.prefixes.documents import NUM_EXAMPLES, is_right, make_document, question
from benchmarks.prefixes.load import Answer, load_row
from benchmarks.prefixes.recall import CONTROL, FULL, Asked, Study, in_tokens, recall_rows
from benchmarks.prefixes.report import markdown, plot
from benchmarks.prefixes.servers import decode_peaks


def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A word, a digit or any other character a token; one special token in front."""
    plain = [ord(piece[0]) for piece in re.findall(r"[A-Za-z]+|.", text, re.DOTALL)]
    return {"input_ids": [1, *plain] if add_special_tokens else plain}


def test_every_fact_stands_in_its_document_once_and_examples_are_not_asked_for() -> None:
    for seed in range(5):
        document = make_document(tokenizer, 700, 9, seed)
        lines = document.text.splitlines()
        facts = [line for line in lines if re.fullmatch(r"The code of \w+ is \d{4}\.", line)]
        assert len(facts) == 9 + NUM_EXAMPLES and len(document.facts) == 9
        asked = [f"{question(station)} {code}." for station, code in document.facts.items()]
        examples = [line for line in document.task.splitlines() if line in facts]
        assert len(examples) == NUM_EXAMPLES and sorted([*asked, *examples]) == sorted(facts)
        assert 700 <= len(tokenizer(f"{document.text}\n")["input_ids"]) - 1 < 730
    assert make_document(tokenizer, 700, 9, 4) == document != make_document(tokenizer, 700, 9, 5)


@pytest.mark.parametrize("num_tokens, num_facts", [(700, 0), (700, 23), (100, 5)])
def test_facts_that_do_not_fit_are_one_line(num_tokens: int, num_facts: int) -> None:
    with pytest.raises(ValueError, match="ask for 1 to"):
        make_document(tokenizer, num_tokens, num_facts, 0)


def test_special_tokens_stand_in_front_of_the_document_alone() -> None:
    asked = in_tokens(tokenizer, make_document(tokenizer, 200, 3, 0))
    assert asked.document[0] == 1
    assert not any(1 in ids for ids in (asked.document[1:], asked.task, *asked.questions))
    # A space, four digits and the point.
    assert asked.answer_len == 6 and len(asked.codes) == len(asked.questions) == 3


def test_an_answer_is_right_if_it_begins_with_the_code_and_no_longer_number() -> None:
    assert is_right(" 4821.\nThe", "4821") and is_right("4821", "4821")
    assert not any(is_right(said, "4821") for said in (" 48213", "The 4821", " 482", "", " 4812."))


def test_what_a_log_says_of_decode_steps() -> None:
    log = """
[t] Decode batch, #running-req: 3, #token: 120, token usage: 0.02, cpu graph: False
[t] Retract requests. #retracted_reqs: 2, #new_tokens_gained: 10
[t] Decode batch, #running-req: 5, #token: 110, token usage: 0.02, cpu graph: False
[t] KV cache pool is full. #retracted_reqs: 1
"""
    assert decode_peaks(log) == (120, 5, 3)
    assert decode_peaks("") == (0, 0, 0)


def row_of_load(setting: str, kept: int, number: int, seconds: float) -> Row:
    answers = [Answer(first_s, {"cached_tokens": 7, "kv_compactions": 2}) for first_s in (0.5, 0.1, 0.3)]
    log = "Decode batch, #running-req: 2, #token: 90, token"
    row = load_row(answers, log, prepare_s=1.234, seconds=seconds, num_tokens=20)
    row |= {"document_len": 60, "prompt_len": 5, "round": number, "setting": setting, "kept": kept, "pool": 200}
    return row | {"budget": 8, "buffer": 4}


def test_a_run_of_requests_becomes_a_row() -> None:
    row = row_of_load("rkv:8:4", 30, 0, 2.0)
    PREFIX_LOAD.check(row)
    assert (row["tokens_per_s"], row["ttft_p50"], row["prepare_s"]) == (30.0, 300.0, 1.23)
    assert (row["slots_held"], row["peak_running"], row["compactions"], row["cached_tokens"]) == (90, 2, 6, 21)


def study() -> Study:
    asked = [Asked([1] * length, [2], [[3], [4]], ["12", "34"], 2) for length in (20, 30)]
    found = Study("small", asked)
    for way, kept, shares in ((FULL, 0, (1.0, 0.5)), ("task", 8, (0.5, 0.5)), (CONTROL, 8, (0.0, 0.5))):
        for share in shares:
            found.note(way, kept, share)
    return found


def test_answers_become_rows_that_compare_document_by_document() -> None:
    rows: dict[Any, Any] = {row["way"]: row for row in recall_rows(study())}
    for row in rows.values():
        PREFIX_RECALL.check(row)
    assert (rows[FULL]["exact"], rows["task"]["exact"], rows[CONTROL]["exact"]) == (0.75, 0.5, 0.25)
    assert (rows["task"]["exact_low"], rows["task"]["exact_high"]) == (0.5, 0.5)
    task = rows["task"]
    assert (task["less_full"], task["less_full_low"], task["less_full_high"]) == (-0.25, -0.5, 0.0)
    assert (task["less_random"], task["less_random_low"], task["less_random_high"]) == (0.25, 0.0, 0.5)
    # There is no draw of the whole document.
    assert rows[FULL]["less_random"] != rows[FULL]["less_random"]
    assert (task["facts"], task["documents"], task["document_len"]) == (4, 2, 25.0)


@pytest.mark.parametrize("parts", ["load", "recall", "load recall"])
def test_each_part_is_told_and_drawn_with_and_without_the_other(tmp_path: Path, parts: str) -> None:
    if "load" in parts:
        rows = [row_of_load(*way, number, 4.0 - number) for number in (0, 1) for way in (("none", 0), ("rkv", 30))]
        rows[1]["tokens_per_s"] = rows[3]["tokens_per_s"] = 60.0
        write_table(tmp_path, PREFIX_LOAD, rows, {})
    if "recall" in parts:
        write_table(tmp_path, PREFIX_RECALL, recall_rows(study()), {})
    told = markdown(tmp_path)
    assert ("| rkv | 30 | 60.0 | 300 |" in told) == ("load" in parts)
    assert ("3.50 (3.00 to 4.00)" in told) == ("load" in parts)
    assert ("| small | task | 8 | 4 | 0.500 [0.500, 0.500] |" in told) == ("recall" in parts)
    assert plot(tmp_path).stat().st_size > 5000


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--parts", "load,other"], "--parts has other: choose from load, recall"),
        (["--kept", "250,x"], "--kept '250,x' is no list of integers: give it as 250,500"),
        (["--kept", "4000"], "--kept 4000 leaves nothing out of a document of 4000 tokens"),
        (["--recall-kept", "1000"], "--recall-kept 1000 leaves nothing out"),
        (["--rounds", "0"], "are numbers of at least 1"),
        (["--setting", "none"], "--setting none makes no prefixes"),
        (["--setting", "rkv"], "the setting 'rkv' is neither none nor"),
        (["--policies", "rkv,best"], "best"),
        (["--pool", "5000"], "--pool 5000 has no room to make the largest prefix: set it to 5033 or more"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prefixes", *flags])
    with pytest.raises(SystemExit, match="2"):
        parse_arguments()
    assert said in capsys.readouterr().err.splitlines()[-1]
