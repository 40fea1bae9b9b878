"""The recall texts: what stands at the steps that they name, whatever the tokenizer does."""

import re
from typing import Any

import pytest

from benchmarks.common.prompts import PROMPTS, load_prompts
from benchmarks.quality.texts import REMARKS, STATIONS, recall_text


class Pieces:
    """A tokenizer that cuts a text into pieces of at most ``size`` characters of one kind, as fast ones report it."""

    def __init__(self, size: int) -> None:
        self.pattern = re.compile(rf"\d{{1,{size}}}|[^\d\s]{{1,{size}}}|\s")
        self.pieces: list[str] = []

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        found = list(self.pattern.finditer(text))
        self.pieces = [match.group() for match in found]
        return {"input_ids": list(range(len(found))), "offset_mapping": [match.span() for match in found]}


@pytest.mark.parametrize("size, num_tokens", [(1, 2800), (3, 900), (4, 700)])
def test_facts_stand_where_the_text_says(size: int, num_tokens: int) -> None:
    tokenizer = Pieces(size)
    for seed in range(5):
        text = recall_text(tokenizer, num_tokens, seed)
        assert text.tokens == list(range(num_tokens)) and len(text.facts) >= 3
        for fact in text.facts:
            code = "".join(tokenizer.pieces[step] for step in fact.asked)
            assert re.fullmatch(r"\d{4}", code)
            num_pieces = len(fact.asked)
            written = tokenizer.pieces[fact.written - num_pieces + 1 : fact.written + 1]
            assert "".join(written) == code
            assert fact.written < fact.asked[0] and fact.asked[-1] < num_tokens
            # The station before the question is the one before the statement: the text is a consistent notebook.
            before = "".join(tokenizer.pieces)
            assert before.count(f"is {code}.") == 2


def test_a_station_has_one_code_and_is_asked_for_once() -> None:
    tokenizer = Pieces(4)
    recall_text(tokenizer, 900, 0)
    lines = re.findall(r"The code of (\w+) is (\d{4})\.", "".join(tokenizer.pieces))
    stations = [station for station, _ in lines]
    assert stations and all(stations.count(station) == 2 for station in stations)
    assert len(set(lines)) == len(lines) // 2


@pytest.mark.parametrize("num_tokens", [700, 1000, 2400])
def test_early_facts_are_asked_for_late_behind_others_like_them(num_tokens: int) -> None:
    tokenizer = Pieces(4)
    for seed in range(5):
        text = recall_text(tokenizer, num_tokens, seed, "early")
        pieces = tokenizer.pieces
        assert text.tokens == list(range(num_tokens)) and len(text.facts) >= 2
        last_written = max(fact.written for fact in text.facts)
        assert last_written < num_tokens * 0.4 and min(fact.asked[0] for fact in text.facts) > last_written
        spread = sorted(fact.asked[0] - fact.written for fact in text.facts)
        assert spread[-1] > num_tokens / 4
        codes = []
        for fact in text.facts:
            (code,) = (pieces[step] for step in fact.asked)
            assert pieces[fact.written] == code and "".join(pieces).count(code) == 2
            codes.append(code)
            between = [piece for piece in pieces[fact.written + 1 : fact.asked[0]] if re.fullmatch(r"\d{4}", piece)]
            # Other numbers than those of facts, so that to keep all numbers is not enough.
            assert len(set(between) - set(codes)) >= 2
        assert len(set(codes)) == len(codes)


def test_equal_seeds_give_equal_texts_and_others_differ() -> None:
    def text(seed: int) -> str:
        tokenizer = Pieces(4)
        recall_text(tokenizer, 300, seed)
        return "".join(tokenizer.pieces)

    assert text(3) == text(3) != text(4)


def test_remarks_cannot_be_taken_for_facts() -> None:
    assert not [remark for remark in REMARKS if re.search(r"\d", remark)]
    assert not [station for station in STATIONS for remark in REMARKS if station in remark]
    assert len(set(REMARKS)) == len(REMARKS) and len(set(STATIONS)) == len(STATIONS)


def test_prompts_are_many_and_different() -> None:
    prompts = load_prompts(PROMPTS, 32)
    assert len(set(prompts)) == 32
    with pytest.raises(ValueError, match="set --num-prompts"):
        load_prompts(PROMPTS, 1000)


def test_prompts_may_come_from_json_lines(tmp_path: Any) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "one"}\n{"problem": "two", "level": 3}\n')
    assert load_prompts(path, 2) == ["one", "two"]
