"""The page of launch lines says what the doctor says, for every family of models on every kind of GPU."""

import functools
import random

import pytest

from devtools.launch_lines import KINDS, LINES, PAGE, judge
from devtools.model_shapes import SHAPES
from rkv_sglang import policy_names
from rkv_sglang.integration.doctor import launch
from tests.docs.pages import table


@pytest.fixture(autouse=True)
def packages_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all else here."""
    monkeypatch.setattr(policy_names, "entry_points", lambda **asked: ())
    monkeypatch.setattr(launch, "entry_points", functools.cache(launch.entry_points))


def rows() -> list[list[str]]:
    return table(PAGE.read_text(), "model", "line")


def test_every_line_and_every_shape_is_on_the_page():
    assert [row[:2] for row in rows()] == [[line.shape, f"`{line.shown}`"] for line in LINES]
    assert {line.shape for line in LINES} == set(SHAPES)


def test_what_the_page_says_of_a_quarter_of_its_cells_is_what_the_doctor_says(rng: random.Random):
    """Which quarter is drawn anew: all of them take minutes."""
    listed = dict(table(PAGE.read_text(), "number", "reason"))
    for line, row in zip(LINES, rows(), strict=True):
        column = rng.randrange(len(KINDS))
        hardware = rng.choice(list(KINDS.values())[column].split(", "))
        verdict = judge(line, hardware)
        cell, _, numbers = row[2 + column].partition(": ")
        assert cell == str(verdict), (line, hardware, verdict)
        assert [listed[number] for number in numbers.split(", ") if number] == list(verdict.reasons)
