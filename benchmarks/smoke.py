"""Run every benchmark at a size that proves only that it works, and check what it wrote: ``make bench-smoke``.

    python -m benchmarks.smoke [--only memory,accuracy] [--out .cache/bench-smoke] [--jobs 2]

Each step is one command; its output goes to a log beside its results. Afterwards every table that the step writes must
be there, have rows, and fit its columns. The figures mean nothing. Exit status 1 if any step fails.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import psutil

from benchmarks.common.asking import ended_with_its_processes
from benchmarks.common.registry import BENCHMARKS, PLOTS, Benchmark
from benchmarks.common.schema import Table, read_table
from devtools.launch import end_process_trees, exit_on_first_signal

# A step takes one or two minutes on two idle cores; a busy machine may take much longer.
TIMEOUT_S = 1200
LOG_LINES = 15
_DRAWING = threading.Lock()
# The models are tiny and several servers run at once: on a busy machine more threads mostly wait for each other.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}


def run_command(command: list[str], log_path: Path, timeout_s: float) -> str | None:
    """Run a command with its output in a file; return one line on what went wrong, or nothing."""
    with log_path.open("wb") as log:
        process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        status = process.wait(timeout_s)
    except psutil.TimeoutExpired:
        return f"not done after {timeout_s:.0f} s"
    finally:
        end_process_trees(process)
    return f"exit status {status}" if status else None


def table_problem(folder: Path, table: Table) -> str | None:
    """Return one line on what is wrong with a table's CSV, or nothing."""
    if not (folder / f"{table.name}.csv").exists():
        return f"{table.name}.csv is missing"
    try:
        rows = read_table(folder, table)
        for row in rows:
            table.check(row)
    except ValueError as error:
        return str(error)
    return None if rows else f"{table.name}.csv has no rows"


def plot_problem(folder: Path, tables: tuple[Table, ...]) -> str | None:
    """Return one line if a plot of the tables cannot be drawn from the CSVs alone, or nothing."""
    for plot in PLOTS:
        if set(plot.tables) & set(tables):
            try:
                plot.draw(folder)
            except (ValueError, OSError) as error:
                return f"{plot.function}: {error}"
    return None


def run_step(step: Benchmark, out: Path, timeout_s: float = TIMEOUT_S) -> str | None:
    """Run a step and check what it wrote; return one line on what went wrong, or nothing."""
    folder = step.smoke_folder(out)
    for table in step.tables:
        (folder / f"{table.name}.csv").unlink(missing_ok=True)
    problem = run_command(step.smoke_command(out), out / f"{step.name}.log", timeout_s)
    for table in step.tables:
        problem = problem or table_problem(folder, table)
    # pyplot draws one picture at a time.
    with _DRAWING:
        return problem or plot_problem(folder, step.tables)


def run_steps(steps: tuple[Benchmark, ...], out: Path, jobs: int = 1) -> int:
    """Run the steps into a new folder, ``jobs`` at a time, print a line each, and return how many failed."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    def timed(step: Benchmark) -> tuple[float, str | None]:
        start = time.monotonic()
        problem = run_step(step, out)
        return time.monotonic() - start, problem

    failed = 0
    with ThreadPoolExecutor(jobs) as pool, ended_with_its_processes(pool):
        running = {pool.submit(timed, step): step for step in steps}
        for number, done in enumerate(as_completed(running), start=1):
            step, (seconds, problem) = running[done], done.result()
            print(f"smoke {number}/{len(steps)}: {step.name} ... {seconds:.0f} s, {problem or 'passed'}", flush=True)
            if problem:
                failed += 1
                log = out / f"{step.name}.log"
                lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                print("\n".join([*(f"  {line}" for line in lines), f"  ({log})"]), flush=True)
    print(f"{len(steps) - failed} passed, {failed} failed", flush=True)
    return failed


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in BENCHMARKS]
    parser.add_argument("--only", help=f"names of steps, comma-separated; all: {','.join(names)}")
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/bench-smoke"), help="emptied first; default %(default)s"
    )
    parser.add_argument("--jobs", type=int, default=1, help="steps at a time; default %(default)s")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else names
    unknown = set(wanted) - set(names)
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    exit_on_first_signal()
    return 1 if run_steps(tuple(step for step in BENCHMARKS if step.name in wanted), options.out, options.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
