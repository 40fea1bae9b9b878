"""Plant faults in a copy of the package, one at a time, and see what finds them.

    python -m tests.fuzz.mutations [--only WORDS] [--schedules 32] [--steps 2000] [--no-tests] [--first-catch]
        [--go-on] [--out FOLDER]

For each fault of ``mutants.py``: does the pool machine find it, after how many schedules does the fuzzer, and does the
test named for it fail? ``--first-catch`` asks the next only where the one before found nothing. Everything runs in a
copy of the checkout; the checkout itself is never changed. Writes ``mutations.csv``, ``mutations.json`` and
``mutations.png`` as it goes; ``--go-on`` goes on after the faults that they have. Status 1 if a fault is found by
nothing.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import benchmark_parser
from benchmarks.common.schema import Row, hardware_folder, read_table, run_info, write_table
from benchmarks.common.tables import MUTATIONS
from tests.fuzz.mutants import MUTANTS, Mutant
from tests.fuzz.report import plot_mutations
from tests.support.harness.environment import PROJECT_ROOT

COPIED = ("rkv_sglang", "tests", "devtools", "benchmarks", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
# Says that a checkout is a copy, in which faults may be planted.
MARK = "a-copy-for-planted-faults"
# So many schedules of one server, then the next: most faults need some one setting.
OF_ONE_SERVER = 4
STRIDE = 7
TEST_TIMEOUT_S = 900
NOT_FOUND = 0
FOLDER = Path(".cache/fuzz")


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
    if text.count(mutant.old) != 1:
        raise RuntimeError(
            f"{mutant.file} has {text.count(mutant.old)} times what {mutant.name!r} changes: bring it up"
        )
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        yield
    finally:
        path.write_text(text)


def find(names: list[str], schedules: int, steps: int, *, first_catch: bool) -> Iterator[dict[str, Any]]:
    """Plant faults in this checkout, a copy, and yield what the pool machine and the fuzzer needed for each."""
    from tests.fuzz.pool_machine import run_steps

    for mutant in (mutant for mutant in MUTANTS if mutant.name in names):
        with planted(PROJECT_ROOT, mutant):
            answer = run_steps(0, steps) if steps else {"status": "ok"}
            found_by_pool = answer["status"] != "ok"
            needed, problem = NOT_FOUND, ""
            if not (found_by_pool and first_catch):
                needed, problem = _search(schedules)
            yield {
                "fault": mutant.name,
                "schedules": needed,
                "problem": " ".join(problem.split())[:160],
                "pool_machine": int(found_by_pool),
                "pool_problem": " ".join(str(answer.get("message", "")).split())[:160],
            }


def _search(schedules: int) -> tuple[int, str]:
    """Run schedules until one fails; return how many were needed, ``NOT_FOUND`` if none did, and its problem."""
    from tests.fuzz.campaign import run_and_check
    from tests.fuzz.generate import BLOCK, schedule_of

    for first in range(0, schedules, OF_ONE_SERVER):
        # Servers of every way to choose come early.
        block = first // OF_ONE_SERVER * STRIDE * BLOCK
        try:
            outcomes = list(run_and_check([schedule_of(block + i) for i in range(OF_ONE_SERVER)]))
        except RuntimeError as error:
            return first + 1, f"no server starts: {str(error)[-300:]}"
        bad = next((i for i, outcome in enumerate(outcomes) if outcome.verdict.problems), None)
        if bad is not None:
            return first + bad + 1, outcomes[bad].verdict.problems[0]
    return NOT_FOUND, ""


def run_test(copy: Path, mutant: Mutant) -> int:
    """Return 1 if the test named for the fault fails, as it should, else 0."""
    with planted(copy, mutant):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.test]
        done = subprocess.run(
            command,
            cwd=copy,
            env=_environment(copy),
            capture_output=True,
            text=True,
            timeout=TEST_TIMEOUT_S,
            check=False,
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(mutant.test)} does not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return int(done.returncode == 1)


def _environment(copy: Path) -> dict[str, str]:
    # Python's own copies of modules are told apart by seconds and size, too coarse for a fault.
    return {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}


def _in_copy(copy: Path, mutants: list[Mutant], options: Any) -> Iterator[dict[str, Any]]:
    """Run ``find`` in the copy, in a process of its own that imports nothing from here."""
    arguments = ["--inside", json.dumps([mutant.name for mutant in mutants])]
    arguments += ["--schedules", str(options.schedules), "--steps", str(options.steps)]
    arguments += ["--first-catch"] * options.first_catch
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.mutations", *arguments],
        cwd=copy,
        env=_environment(copy),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("FOUND "):
            yield json.loads(line.removeprefix("FOUND "))
    if process.wait():
        raise RuntimeError("the search in the copy failed; see above")


def main() -> int:
    """Run from the command line."""
    parser = benchmark_parser(__doc__, smoke="one fault; into .cache/fuzz unless told otherwise")
    parser.add_argument("--only", default="", help="faults whose names have these words")
    parser.add_argument("--schedules", type=int, default=32, help="most for each fault, default %(default)s")
    parser.add_argument("--steps", type=int, default=2000, help="of the pool machine, default %(default)s; 0: none")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests named for the faults out")
    parser.add_argument("--first-catch", action="store_true", help="stop at what finds a fault first")
    parser.add_argument("--go-on", action="store_true", help="after the faults that the folder's mutations.csv has")
    parser.add_argument("--inside", help="names of faults, in a copy; used by this script itself")
    options = parser.parse_args()
    if options.inside:
        names = json.loads(options.inside)
        for found in find(names, options.schedules, options.steps, first_catch=options.first_catch):
            print("FOUND " + json.dumps(found), flush=True)
        return 0
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if options.smoke:
        mutants, options.out = [MUTANTS[4]], options.out or FOLDER
        options.schedules = options.steps = 0
    out = options.out or hardware_folder()
    rows: list[Row] = read_table(out, MUTATIONS) if options.go_on and (out / f"{MUTATIONS.name}.csv").exists() else []
    done = {row["fault"] for row in rows}
    mutants = [mutant for mutant in mutants if mutant.name not in done]
    with copied_checkout() as copy:
        for mutant, found in zip(mutants, _in_copy(copy, mutants, options), strict=True):
            row: Row = {**found, "file": mutant.file, "test": " ".join(mutant.test), "test_fails": 0}
            is_found = row["schedules"] or row["pool_machine"]
            if not options.no_tests and not (is_found and options.first_catch):
                # Meanwhile the other copy's search goes on to the next fault, so this needs a copy of its own.
                with copied_checkout() as own:
                    row["test_fails"] = run_test(own, mutant)
            rows.append(row)
            print(f"{mutant.name}: {row}", flush=True)
            # At once, for the whole takes long.
            write_table(out, MUTATIONS, rows, run_info(most_schedules=options.schedules, steps=options.steps))
    plot_mutations(out)
    missed = [row["fault"] for row in rows if not (row["schedules"] or row["pool_machine"] or row["test_fails"])]
    print(f"{len(rows) - len(missed)} of {len(rows)} faults found; missed: {missed}")
    return min(len(missed), 1)


if __name__ == "__main__":
    sys.exit(main())
