"""Documents with facts in them, and what is asked behind them."""

import random
from dataclasses import dataclass
from typing import Any

from benchmarks.common.notebook import REMARKS, STATIONS

# Facts that a task shows as examples, and are not asked for.
NUM_EXAMPLES = 2
MOST_FACTS = len(STATIONS) - NUM_EXAMPLES
# A fact takes some twelve tokens, a remark twelve more.
TOKENS_A_FACT = 24


@dataclass(frozen=True)
class Document:
    """A notebook.

    Attributes:
        text: Its lines: remarks, and a line for each fact, anywhere.
        task: What comes behind it in front of every question: what is asked, with examples.
        facts: Of each station that is asked for its code.
    """

    text: str
    task: str
    facts: dict[str, str]


def question(station: str) -> str:
    """Return what is asked for a fact; the answer begins with its code."""
    return f"The code of {station} is"


def is_right(answer: str, code: str) -> bool:
    """Return whether an answer begins with a code, and not with a longer number."""
    said = answer.strip()
    return said.startswith(code) and not said[len(code) : len(code) + 1].isdigit()


def make_document(tokenizer: Any, num_tokens: int, num_facts: int, seed: int) -> Document:
    """Return a notebook of at least ``num_tokens`` tokens; equal seeds give equal notebooks.

    Raises:
        ValueError: There are not so many stations, or so many facts do not fit; one line.
    """
    most = min(MOST_FACTS, num_tokens // TOKENS_A_FACT - NUM_EXAMPLES)
    if not 1 <= num_facts <= most:
        raise ValueError(f"{num_facts} facts do not fit a document of {num_tokens} tokens: ask for 1 to {most}")
    rng = random.Random(seed)
    stations = rng.sample(STATIONS, NUM_EXAMPLES + num_facts)
    codes = [str(code) for code in rng.sample(range(1000, 10000), len(stations))]
    lines = [f"{question(station)} {code}." for station, code in zip(stations, codes, strict=True)]
    examples = "\n".join(lines[:NUM_EXAMPLES])
    length = sum(_num_tokens(tokenizer, line) for line in lines)
    remarks: list[str] = []
    while length < num_tokens:
        remarks = remarks or rng.sample(REMARKS, len(REMARKS))
        lines.append(remarks.pop())
        length += _num_tokens(tokenizer, lines[-1])
    rng.shuffle(lines)
    task = f"\n\nThe codes of the stations stand in the notebook above. Give them again.\n\n{examples}\n"
    facts = dict(zip(stations[NUM_EXAMPLES:], codes[NUM_EXAMPLES:], strict=True))
    return Document("\n".join(lines), task, facts)


def _num_tokens(tokenizer: Any, line: str) -> int:
    return len(tokenizer(f"{line}\n", add_special_tokens=False)["input_ids"])
