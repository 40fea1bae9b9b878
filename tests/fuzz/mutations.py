"""Plant faults in a copy of the package, one at a time, and see what finds them.

    python -m tests.fuzz.mutations [--only WORDS] [--parts test pool fuzz] [--schedules 32] [--steps 2000]
        [--first-catch] [--go-on] [--out FOLDER]

For each fault of ``faults/``: does the test named for it fail, does the pool machine find it, and after how many
schedules does the fuzzer? ``--first-catch`` asks the next only where those before found nothing. Everything runs in a
copy of the checkout; the checkout itself is never changed. Writes ``mutations.csv``, ``mutations.json`` and
``mutations.png`` as it goes; ``--go-on`` asks only what they do not say yet. Status 1 if a fault is found by nothing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import benchmark_parser
from benchmarks.common.schema import Row, hardware_folder, read_table, run_info, write_table
from benchmarks.common.tables import MUTATIONS
from tests.fuzz.faults.catalogue import MUTANTS
from tests.fuzz.faults.judge import (
    ANSWERS,
    NOT_ASKED,
    NOTHING,
    PARTS,
    TEST,
    ask,
    copied_checkout,
    is_found,
    is_judged,
    planted,
    still_answers,
)
from tests.fuzz.report import plot_mutations
from tests.support.harness.environment import PROJECT_ROOT

FOLDER = Path(".cache/fuzz")
SMOKE = "a page is freed that still holds kept tokens"


def judge(rows: list[Row], options: Any) -> Iterator[Row]:
    """Plant the faults of these rows in this checkout, a copy, and yield each row with the answers of all asked."""
    mutants = {mutant.name: mutant for mutant in MUTANTS}
    for row in rows:
        mutant, answers = mutants[str(row["fault"])], dict(row)
        started = time.monotonic()
        with planted(PROJECT_ROOT, mutant):
            for part in options.parts:
                if answers[ANSWERS[part]] == NOT_ASKED and not (options.first_catch and is_found(answers)):
                    answers |= ask(part, mutant, schedules=options.schedules, steps=options.steps)
        yield {**answers, "seconds": round(float(row["seconds"]) + time.monotonic() - started, 1)}


def _in_copy(copy: Path, rows: list[Row], words: list[str]) -> Iterator[Row]:
    """Run ``judge`` in the copy, in a process of its own that imports nothing from here."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.mutations", *words, "--inside"],
        cwd=copy,
        # Python's own copies of modules are told apart by seconds and size, too coarse for a fault.
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(rows))
    process.stdin.close()
    for line in process.stdout:
        if line.startswith("FOUND "):
            yield json.loads(line.removeprefix("FOUND "))
    if process.wait():
        raise RuntimeError("the search in the copy failed; see above")


def main() -> int:
    """Run from the command line."""
    parser = benchmark_parser(__doc__, smoke="one fault and its test; into .cache/fuzz unless told otherwise")
    parser.add_argument("--only", default="", help="faults whose names have these words")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is asked, in this order")
    parser.add_argument("--schedules", type=int, default=32, help="most for each fault, default %(default)s")
    parser.add_argument("--steps", type=int, default=2000, help="of the pool machine, default %(default)s")
    parser.add_argument("--first-catch", action="store_true", help="stop at what finds a fault first")
    parser.add_argument("--go-on", action="store_true", help="with what the folder's mutations.csv says")
    parser.add_argument("--inside", action="store_true", help="in a copy; used by this script itself")
    options = parser.parse_args()
    if options.inside:
        for row in judge(json.load(sys.stdin), options):
            print("FOUND " + json.dumps(row), flush=True)
        return 0
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.name]
    words = sys.argv[1:]
    if options.smoke:
        mutants, options.out = [mutant for mutant in MUTANTS if mutant.name == SMOKE], options.out or FOLDER
        options.parts = [TEST]
        words = ["--parts", TEST]
    out = options.out or hardware_folder()
    known = options.go_on and (out / f"{MUTATIONS.name}.csv").exists()
    answers = {row["fault"]: row for row in (read_table(out, MUTATIONS) if known else [])}
    rows: list[Row] = []
    for mutant in mutants:
        row: Row = {**NOTHING, "seconds": 0.0, **still_answers(answers.get(mutant.name, {}), mutant)}
        rows.append({**row, "fault": mutant.name, "file": mutant.file, "test": " ".join(mutant.test)})
    place = {row["fault"]: number for number, row in enumerate(rows)}
    open_rows = [row for row in rows if not is_judged(row, tuple(options.parts), first_catch=options.first_catch)]
    with copied_checkout() as copy:
        for row in _in_copy(copy, open_rows, words):
            rows[place[row["fault"]]] = row
            print(f"{row['fault']}: {row}", flush=True)
            # At once, for the whole takes long.
            info = run_info(most_schedules=options.schedules, steps=options.steps, parts=list(options.parts))
            write_table(out, MUTATIONS, rows, info)
    plot_mutations(out)
    missed = [row["fault"] for row in rows if not is_found(row)]
    print(f"{len(rows) - len(missed)} of {len(rows)} faults found; missed: {missed}")
    return min(len(missed), 1)


if __name__ == "__main__":
    sys.exit(main())
