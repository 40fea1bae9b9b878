"""Answers with facts in them that are asked for later on, for the model to be forced along."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.notebook import REMARKS, STATIONS

RECALL_QUESTION = (
    "Keep a notebook. Write down everyday remarks and the code of every station, and write the code of a station again "
    "whenever it is needed."
)
RECALL_FORMS = ("mixed", "early")
# Tokens of a line, roughly: how many lines make a text of a given length.
_TOKENS_A_LINE = 13
# How many lines after a fact it is asked for; long ones first, while there is room for them.
_DELAYS = (30, 22, 16, 11, 8, 5, 3, 2, 1)


@dataclass(frozen=True)
class Fact:
    """One fact of a recall text: the step of its last written token, and the steps of the tokens that repeat it."""

    written: int
    asked: tuple[int, ...]


@dataclass(frozen=True)
class RecallText:
    """An answer to be forced, and the facts in it that are asked for before it ends."""

    tokens: list[int]
    facts: list[Fact]


def recall_text(tokenizer: Any, num_tokens: int, seed: int, form: str = "mixed") -> RecallText:
    """Return a notebook of ``num_tokens`` tokens; equal seeds give equal notebooks.

    Its lines are remarks, facts such as ``The code of Lima is 4821.``, and later, once for each fact, the same line
    again. A language model that can look back completes it; the tokens of the digits are what recall is judged by.

    Args:
        form: ``mixed``: facts anywhere, asked for a few lines later or many. ``early``: all facts in the first part,
            asked for one after the other up to the end, and in between lines like them of other stations: what keeps
            the latest tokens has none of the facts, and what keeps numbers has too many of them.
    """
    notebook = {"mixed": _notebook, "early": _early_notebook}[form]
    lines, facts = notebook(random.Random(seed), num_tokens // _TOKENS_A_LINE + 2)
    text = "\n".join(lines)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    found = []
    for written, asked, code in facts:
        where = [starts[line] + lines[line].index(code) for line in (written, asked)]
        steps = [_steps_of(spans, begin, begin + len(code)) for begin in where]
        if max(steps[1]) < num_tokens:
            found.append(Fact(max(steps[0]), tuple(steps[1])))
    return RecallText(encoded["input_ids"][:num_tokens], found)


def _steps_of(spans: Sequence[tuple[int, int]], begin: int, end: int) -> list[int]:
    return [i for i, (first, last) in enumerate(spans) if first < end and last > begin]


def _early_notebook(rng: random.Random, num_lines: int) -> tuple[list[str], list[tuple[int, int, str]]]:
    """Return what ``_notebook`` does, with all facts in the first quarter and distractors behind them."""
    stations = rng.sample(STATIONS, len(STATIONS))
    half = len(stations) // 2
    num_facts = min(half, max(3, num_lines // 12))
    codes = [str(code) for code in rng.sample(range(1000, 10000), num_facts + num_lines)]
    # Every other line, so that no two facts are neighbours; the last question comes right before the end.
    written = [2 * i for i in range(num_facts)]
    first, last = max(num_lines // 4, 2 * num_facts), num_lines - 3
    asked = sorted(rng.sample(range(first, last + 1), num_facts))
    order = rng.sample(range(num_facts), num_facts)
    lines: list[str] = []
    remarks: list[str] = []
    facts = [(written[fact], line, codes[fact]) for fact, line in zip(order, asked, strict=True)]
    of_line = {line: fact for fact, line in enumerate(written)} | dict(zip(asked, order, strict=True))
    for line in range(num_lines):
        if line in of_line:
            lines.append(f"The code of {stations[of_line[line]]} is {codes[of_line[line]]}.")
        elif line >= 2 * num_facts and rng.random() < 0.5:
            other = rng.choice(stations[half:])
            lines.append(f"The code of {other} was {codes[num_facts + line]} until today.")
        else:
            remarks = remarks or rng.sample(REMARKS, len(REMARKS))
            lines.append(remarks.pop())
    return lines, facts


def _notebook(rng: random.Random, num_lines: int) -> tuple[list[str], list[tuple[int, int, str]]]:
    """Return the lines, and (line that states it, line that asks for it, code) of every fact."""
    free = set(range(num_lines))
    lines = [""] * num_lines
    facts: list[tuple[int, int, str]] = []
    stations = rng.sample(STATIONS, len(STATIONS))
    # About half of the lines belong to facts; the rest is what lies between them.
    for delay in _DELAYS * 2:
        places = [line for line in sorted(free) if line + delay in free]
        if not places or len(free) <= num_lines // 2:
            continue
        written = rng.choice(places)
        code = str(rng.randint(1000, 9999))
        free -= {written, written + delay}
        lines[written] = lines[written + delay] = f"The code of {stations[len(facts)]} is {code}."
        facts.append((written, written + delay, code))
    remarks: list[str] = []
    for line in sorted(free):
        remarks = remarks or rng.sample(REMARKS, len(REMARKS))
        lines[line] = remarks.pop()
    return lines, facts
