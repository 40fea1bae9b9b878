"""Plants a fault in a copy of the checkout and asks what finds it: its test, the pool machine, the fuzzer.

All of them run in processes that fork from one helper with SGLang imported, and import the package anew.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fuzz.faults.mutant import Mutant
from tests.support.harness.environment import PROBE_DIR, PROJECT_ROOT
from tests.support.harness.scheduler import helper_address, run_job, use_helper

COPIED = ("rkv_sglang", "tests", "devtools", "benchmarks", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
# Says that a checkout is a copy, in which faults may be planted.
MARK = "a-copy-for-planted-faults"
# So many schedules of one server, then the next: most faults need some one setting.
OF_ONE_SERVER = 4
STRIDE = 7
TEST_TIMEOUT_S = 600.0
TEST, POOL, FUZZ = "test", "pool", "fuzz"
PARTS = (TEST, POOL, FUZZ)
NOT_ASKED, NOT_FOUND = -1, 0
# What is known of a fault before anything is asked.
NOTHING: Mapping[str, Any] = {
    "test_fails": NOT_ASKED,
    "test_problem": "",
    "pool_machine": NOT_ASKED,
    "pool_problem": "",
    "schedules": NOT_ASKED,
    "most_schedules": NOT_ASKED,
    "seed": NOT_ASKED,
    "problem": "",
}
# The column that says whether a part found the fault.
ANSWERS = {TEST: "test_fails", POOL: "pool_machine", FUZZ: "schedules"}


@contextmanager
def copied_checkout() -> Iterator[Path]:
    """Make a copy of what runs, with the same environment and models."""
    with tempfile.TemporaryDirectory(prefix="rkv-mutations-") as name:
        copy = Path(name)
        for part in COPIED:
            source = PROJECT_ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
            elif source.exists():
                shutil.copy(source, copy / part)
        for shared in (".venv", ".cache"):
            (copy / shared).symlink_to((PROJECT_ROOT / shared).resolve())
        (copy / MARK).touch()
        yield copy


def with_fault(root: Path, mutant: Mutant) -> str:
    """Return the text of the fault's file with the fault in it.

    Raises:
        RuntimeError: What it changes does not stand there once.
    """
    text = (root / "rkv_sglang" / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise RuntimeError(
            f"{mutant.file} has {text.count(mutant.old)} times what {mutant.name!r} changes: bring it up"
        )
    return text.replace(mutant.old, mutant.new)


@contextmanager
def planted(root: Path, mutant: Mutant) -> Iterator[None]:
    """Plant a fault in a copy.

    Raises:
        RuntimeError: It is no copy, or the text to change does not stand there once.
    """
    if not (root / MARK).exists():
        raise RuntimeError(f"{root} is no copy made for this")
    path = root / "rkv_sglang" / mutant.file
    text = path.read_text()
    path.write_text(with_fault(root, mutant))
    try:
        yield
    finally:
        path.write_text(text)


def is_found(answers: Mapping[str, Any]) -> bool:
    """Return whether any part found the fault."""
    return any(answers[column] > NOT_FOUND for column in ANSWERS.values())


def is_judged(answers: Mapping[str, Any], parts: tuple[str, ...], *, first_catch: bool) -> bool:
    """Return whether nothing is left to be asked."""
    return (first_catch and is_found(answers)) or all(answers[ANSWERS[part]] != NOT_ASKED for part in parts)


def still_answers(row: Mapping[str, Any], mutant: Mutant) -> dict[str, Any]:
    """Return what an earlier row says of a fault; nothing of its test if that was another one."""
    same = row.get("test") == " ".join(mutant.test)
    return {**row} if same else {**row, "test_fails": NOT_ASKED, "test_problem": ""}


def ask(part: str, mutant: Mutant, *, schedules: int, steps: int) -> dict[str, Any]:
    """Return one part's answer, by column, on a fault that is planted in this checkout, a copy."""
    if part == TEST:
        failed = run_test(mutant)
        return {"test_fails": int(bool(failed)), "test_problem": _short(failed[0] if failed else "")}
    if part == POOL:
        from tests.fuzz.pool_machine import run_steps

        answer = run_steps(0, steps)
        found = answer["status"] != "ok"
        return {"pool_machine": int(found), "pool_problem": _short(answer.get("message", ""))}
    needed, seed, problem = _search(schedules)
    return {"schedules": needed, "most_schedules": schedules, "seed": seed, "problem": _short(problem)}


def _short(text: object) -> str:
    return " ".join(str(text).split())[:160]


def _search(schedules: int) -> tuple[int, int, str]:
    """Run schedules until one fails; return how many were needed, its seed and its problem.

    ``NOT_FOUND`` and ``NOT_ASKED`` take the places of the first two if none fails.
    """
    from tests.fuzz.campaign import run_and_check
    from tests.fuzz.draw.schedules import BLOCK, schedule_of

    for first in range(0, schedules, OF_ONE_SERVER):
        # Servers of every way to choose come early.
        seed = first // OF_ONE_SERVER * STRIDE * BLOCK
        try:
            outcomes = list(run_and_check([schedule_of(seed + i) for i in range(OF_ONE_SERVER)]))
        except RuntimeError as error:
            return first + 1, seed, f"no server starts: {str(error)[-300:]}"
        bad = next((i for i, outcome in enumerate(outcomes) if outcome.verdict.problems), None)
        if bad is not None:
            return first + bad + 1, seed + bad, outcomes[bad].verdict.problems[0]
    return NOT_FOUND, NOT_ASKED, ""


def run_test(mutant: Mutant) -> list[str]:
    """Run the test named for a fault, in this checkout; return its failures, the first ends it.

    Raises:
        RuntimeError: There is no such test, or it does not run.
    """
    folder = tempfile.mkdtemp(prefix="rkv-named-test-")
    job = {"call": f"{__name__}:pytest_job", "folder": folder, "env": dict(os.environ), "helper": helper_address()}
    try:
        answer = run_job({**job, "test": mutant.test}, TEST_TIMEOUT_S)
        log = Path(folder, "log")
        output = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if answer["status"] == "timeout":
        return [f"it does not end within {TEST_TIMEOUT_S:.0f} s"]
    if answer["status"] != "ok" or answer["code"] not in (0, 1):
        raise RuntimeError(f"{' '.join(mutant.test)} does not run: {answer}\n{output}")
    return list(answer["failed"])


def pytest_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run a test in this process, forked from the helper; its own schedulers fork from the same one."""
    import pytest

    failed: list[str] = []

    class Failures:
        """Notes what fails: which test, and the first line that says how."""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                lines = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
                failed.append(f"{report.nodeid.rpartition('::')[2]}: {next(iter(lines), '')}")

    # As in a process that was not made for schedulers.
    sys.path[:] = [path for path in sys.path if path != str(PROBE_DIR)]
    use_helper(job["helper"])
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *job["test"]], plugins=[Failures()])
    return {"status": "ok", "code": int(code), "failed": failed}
