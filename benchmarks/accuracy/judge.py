"""The checker in a process of its own, which can be ended whatever it computes."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from types import TracebackType
from typing import Any

from benchmarks.accuracy.checker import UNJUDGED, Verdict
from benchmarks.accuracy.problems import Problem
from benchmarks.accuracy.store import Sample

# Of a CPU, for one answer; what takes longer is not decided by waiting.
CPU_SECONDS = 10


class Judge:
    """``with Judge() as judge:`` judges answers one at a time.

    An answer that takes the checker more than ``cpu_seconds`` of a CPU, or all memory, is unjudged. The time for which
    a busy machine does not let it run does not count.
    """

    def __init__(self, cpu_seconds: int = CPU_SECONDS) -> None:
        self._command = [sys.executable, "-m", "benchmarks.accuracy.checker", str(cpu_seconds)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Judge":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def require(self, answer: str) -> None:
        """See that a known answer can be read.

        Raises:
            ValueError: It cannot, or not in time; one line.
            ModuleNotFoundError: ``math-verify`` is not installed; one line.
        """
        said = self._ask(text="", answer=answer, truncated=False)
        if said is None or said.get("kind") == "ValueError":
            raise ValueError(f"the known answer {answer!r} cannot be read")
        if "error" in said:
            raise ModuleNotFoundError(said["error"])

    def verdict(self, text: str, answer: str, truncated: bool = False) -> Verdict:
        """Judge one output against a known answer that ``require`` has let pass; see ``checker.check``."""
        said = self._ask(text=text, answer=answer, truncated=truncated)
        return Verdict(UNJUDGED, "") if said is None or "error" in said else Verdict(**said)

    def compare(self, text: str, truncated: bool, other_text: str, other_truncated: bool) -> str:
        """Say whether two outputs have the same final answer; see ``checker.compare``; unjudged if not in time."""
        said = self._ask(text=text, truncated=truncated, other_text=other_text, other_truncated=other_truncated)
        return UNJUDGED if said is None else str(said["outcome"])

    def _ask(self, **question: str | bool) -> dict[str, Any] | None:
        """Return what the checker says; None if it ended instead."""
        line = json.dumps(question)
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        said = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
        if not said.endswith("\n"):
            self._end()
            return None
        return dict(json.loads(said))

    def _start(self) -> "subprocess.Popen[str]":
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def judged(judge: Judge, problem: Problem, sample: Sample) -> Sample:
    """Return a sample with what the judge says of it; of an answer that was cut off only what is boxed counts."""
    verdict = judge.verdict(sample.text, problem.answer, truncated=sample.truncated)
    return replace(sample, outcome=verdict.outcome, found=verdict.found)
