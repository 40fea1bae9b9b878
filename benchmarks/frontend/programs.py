"""Programs of SGLang's frontend language: short ones, never compacted, and long ones, compacted in every answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sglang as sgl

OPINIONS = ("good", "bad", "neither")
# Other first letters, so that no branch hits what another one wrote.
BRANCHES = ("Apples", "Boats", "Clouds")


@dataclass(frozen=True)
class Program:
    """A frontend program with the names of its variables, what each of its selections may choose, and if it forks."""

    name: str
    function: Any
    variables: tuple[str, ...]
    choices: Mapping[str, Sequence[str]]
    forks: bool = False


def _gen(name: str, num_tokens: int) -> Any:
    return sgl.gen(name, max_tokens=num_tokens, ignore_eos=True)


def answer_program(length: str, num_tokens: int) -> Program:
    """Generate, select, generate."""

    @sgl.function
    def program(s: Any) -> None:
        s += "A short report on the weather of last week.\n" + _gen("report", num_tokens)
        s += "\nAll in all the week was " + sgl.select("opinion", choices=list(OPINIONS))
        s += ".\nNext week:\n" + _gen("forecast", num_tokens)

    return Program(f"answer_{length}", program, ("report", "opinion", "forecast"), {"opinion": OPINIONS})


def fork_program(length: str, num_tokens: int) -> Program:
    """Generate, fork, generate in every branch, join and select."""

    @sgl.function
    def program(s: Any) -> None:
        s += "Notes on three things.\n" + _gen("plan", num_tokens) + "\n"
        branches = s.fork(len(BRANCHES))
        for branch, title in zip(branches, BRANCHES, strict=True):
            branch += title + ": " + _gen("note", num_tokens)
        for branch, title in zip(branches, BRANCHES, strict=True):
            s += f"{title}: {branch['note']}\n"
            s.set_var(title, branch["note"])
        s += "The notes are " + sgl.select("opinion", choices=list(OPINIONS))

    return Program(f"fork_{length}", program, ("plan", *BRANCHES, "opinion"), {"opinion": OPINIONS}, True)


def turns_program(length: str, num_tokens: int) -> Program:
    """Three turns of a chat, each behind all before it."""

    @sgl.function
    def program(s: Any) -> None:
        for turn, question in enumerate(("What is a prime?", "Name some of them.", "Are there more?"), start=1):
            s += sgl.user(question)
            s += sgl.assistant(_gen(f"turn{turn}", num_tokens))

    return Program(f"turns_{length}", program, ("turn1", "turn2", "turn3"), {})


def all_programs(budget: int, buffer: int) -> list[Program]:
    """Return every program in a length that is never compacted and in one whose every answer is, more than once."""
    lengths = {"short": (budget + buffer) // 2, "long": budget + 3 * buffer}
    makers = (answer_program, fork_program, turns_program)
    return [make(length, num_tokens) for length, num_tokens in lengths.items() for make in makers]
