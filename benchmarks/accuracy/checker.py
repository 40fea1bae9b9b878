"""Is an answer right, and is it the same as another? ``math-verify`` compares numbers, expressions and sets by value.

As a program it judges lines of JSON from its standard input, for ``benchmarks.accuracy.judge``.
"""

import contextlib
import functools
import json
import logging
import re
import resource
import signal
import sys
from dataclasses import asdict, dataclass
from typing import Any

# What a reasoning model thinks is not its answer; a chat template may hold the opening tag.
_END_OF_THINKING = "</think>"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Of the answer as it was read.
MOST_FOUND = 1000
# Numbers like 9^(9^(9^9)) would take all that there is.
_MOST_MEMORY = 4 * 2**30
UNJUDGED = "unjudged"
# What comparing two outputs may say besides.
SAME, OTHER, NEITHER = "same", "other", "neither"


@dataclass(frozen=True)
class Verdict:
    """``outcome`` is right, wrong, none if no answer was found, or unjudged if it could not be judged in time.

    ``found`` is the answer as it was read, cut if it is long.
    """

    outcome: str
    found: str


def check(text: str, answer: str, truncated: bool = False) -> Verdict:
    """Judge one output against the known answer, however long that takes.

    Thoughts are left out where their end is marked. Otherwise the boxed expression counts, or else what stands where
    answers do ("the answer is ..."), or else the last number. A truncated output must have boxed something: the last
    number before the cut is no answer.

    Raises:
        ValueError: The known answer cannot be read.
        ModuleNotFoundError: ``math-verify`` is not installed; one line.
    """
    expected = read_known(answer)
    found = _read(text, truncated)
    if not found:
        return Verdict("none", "")
    outcome = "right" if _library().verify(expected, found, timeout_seconds=None) else "wrong"
    return Verdict(outcome, _written(found[-1]))


def compare(text: str, truncated: bool, other_text: str, other_truncated: bool) -> str:
    """Return whether two outputs have the same final answer, each read as in ``check``.

    Returns:
        ``same``, ``other``, or ``neither`` if none of them has an answer. One with an answer and one without are other.
    """
    found, other = _read(text, truncated), _read(other_text, other_truncated)
    if not found and not other:
        return NEITHER
    if not found or not other:
        return OTHER
    return SAME if _library().verify(other, found, timeout_seconds=None) else OTHER


def _read(text: str, truncated: bool) -> Any:
    """Return the final answer as ``math-verify`` reads it; empty if there is none."""
    final = text.rpartition(_END_OF_THINKING)[2]
    if truncated and not _BOXED.search(final):
        return []
    return _library().parse(final, parsing_timeout=None)


@functools.cache
def read_known(answer: str) -> Any:
    """Return a known answer as ``math-verify`` reads it, once.

    Raises:
        ValueError: It cannot be read.
        ModuleNotFoundError: ``math-verify`` is not installed; one line.
    """
    expected = _library().parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not expected:
        raise ValueError(f"the known answer {answer!r} cannot be read")
    return expected


def _written(found: Any) -> str:
    try:
        return str(found)[:MOST_FOUND]
    except ValueError:
        # Python writes out no number of so many digits.
        return ""


@functools.cache
def _library() -> Any:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the answer checker is missing: pip install 'math-verify[antlr4_13_2]'") from error
    # It says, at every start, that nobody limits its time.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def _judge_lines(seconds: int) -> None:
    """Answer every line from the standard input with one, and end before one takes more than ``seconds`` of a CPU.

    A busy machine changes nothing, and the kernel ends this process also in the middle of one long multiplication,
    where no alarm of Python's is heard.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    # Its import is no answer's time; where it is missing, every line is told.
    with contextlib.suppress(ModuleNotFoundError):
        _library()
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))
        print(json.dumps(_answered(json.loads(line))), flush=True)


def _answered(question: dict[str, Any]) -> dict[str, str]:
    """Return what is said to one question: the arguments of ``check`` or of ``compare``."""
    if "answer" in question:
        try:
            read_known(question["answer"])
        except (ValueError, ModuleNotFoundError) as error:
            return {"error": str(error), "kind": type(error).__name__}
    try:
        return asdict(check(**question) if "answer" in question else Verdict(compare(**question), ""))
    # Whatever a library of mathematics makes of what a model writes.
    except Exception:
        return asdict(Verdict(UNJUDGED, ""))


if __name__ == "__main__":
    _judge_lines(int(sys.argv[1]))
