"""Is an answer right? Judged by ``math-verify``, which compares numbers, expressions, sets and the like by value."""

import re
from dataclasses import dataclass
from typing import Any

# What a reasoning model thinks is not its answer; a chat template may hold the opening tag.
_END_OF_THINKING = "</think>"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


@dataclass(frozen=True)
class Verdict:
    """``outcome`` is right, wrong, or none if no answer was found; ``found`` is the answer as it was read."""

    outcome: str
    found: str


def check(text: str, answer: str, truncated: bool = False) -> Verdict:
    """Judge one output against the known answer.

    Thoughts are left out where their end is marked. Otherwise the boxed expression counts, or else what stands where
    answers do ("the answer is ..."), or else the last number. A truncated output must have boxed something: the last
    number before the cut is no answer.

    Must run in the main thread, because ``math-verify`` limits its time by a signal: 5 s to read and 5 s to compare,
    after which an output counts as having no answer, or as wrong.

    Raises:
        ValueError: The known answer cannot be read, or this is not the main thread.
        ModuleNotFoundError: ``math-verify`` is not installed; one line.
    """
    library = _library()
    expected = library.parse(f"\\boxed{{{answer}}}")
    if not expected:
        raise ValueError(f"the known answer {answer!r} cannot be read")
    final = text.rpartition(_END_OF_THINKING)[2]
    if truncated and not _BOXED.search(final):
        return Verdict("none", "")
    found = library.parse(final)
    if not found:
        return Verdict("none", "")
    outcome = "right" if library.verify(expected, found) else "wrong"
    return Verdict(outcome, str(found[-1]))


def _library() -> Any:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the answer checker is missing: pip install 'math-verify[antlr4_13_2]'") from error
    return math_verify
