"""Search for schedules under which the policy gives a wrong token, loses memory or miscounts.

    python -m tests.fuzz [--schedules 2000] [--first 0] [--of-each 25] [--go-on] [--out FOLDER] [--smoke]
    python -m tests.fuzz --join FOLDER FOLDER [--out FOLDER]   put runs that went side by side into one record
    python -m tests.fuzz --replay SEED | --file FILE   run one schedule again
    python -m tests.fuzz --replay SEED --block         with those that ran in its process before it
    python -m tests.fuzz --shrink SEED                 make a failing one smaller and write it to .cache/fuzz

A schedule comes from one integer (``draw/``): a server's settings, requests, and what is done to them. The real
scheduler runs it with tiny models in fp32, SGLang's strict checks and ``RKV_SGLANG_VERIFY=1`` (``inside/``); then
every answer is compared with the dense oracle, or with that of the same request alone (``check.py``). Writes
``fuzz.csv``, ``fuzz.json`` and ``fuzz.png``. A failing seed is printed, and made smaller.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import benchmark_parser
from benchmarks.common.schema import Row, hardware_folder, read_table, run_info, write_table
from benchmarks.common.tables import FUZZ
from tests.fuzz.campaign import Outcome, run_and_check
from tests.fuzz.draw.schedules import BLOCK, schedule_of
from tests.fuzz.report import plot_schedules, restores, row_of, shares, totals
from tests.fuzz.schedule import Schedule
from tests.fuzz.shrink import do_fail, shrink

FOLDER = Path(".cache/fuzz")
SMOKE = {"schedules": 2, "first": 17}


def seeds_of(first: int, count: int, of_each: int) -> list[int]:
    """Return the seeds of so many schedules from ``first`` on, ``of_each`` of every server's."""
    return [first + number // of_each * BLOCK + number % of_each for number in range(count)]


def record(seeds: list[int], out: Path, rows: list[Row]) -> int:
    """Run the schedules of these seeds and keep a row of each; return how many failed.

    Args:
        rows: Of the schedules that ran before, with the same code; they are not run again.
    """
    failed: list[Outcome] = []
    counts = _counts_before(out, rows)
    start = time.monotonic() - 60 * _minutes_before(out, rows)
    count, left = len(seeds), [schedule_of(seed) for seed in seeds[len(rows) :]]
    for number, outcome in enumerate(run_and_check(left), start=len(rows) + 1):
        rows.append(row_of(outcome))
        counts += outcome.verdict.counts
        if outcome.verdict.problems:
            failed.append(outcome)
            tell_failure(outcome)
        if number % BLOCK == 0 or number == count:
            minutes = (time.monotonic() - start) / 60
            print(f"{number} of {count} schedules, {minutes:.1f} min, {len(failed)} failed", flush=True)
            info = run_info(
                first=seeds[0],
                minutes=round(minutes, 1),
                failed_seeds=[row["seed"] for row in rows if row["violations"]],
                totals=totals(rows),
                counts=dict(counts),
                shares=shares(rows),
                restores=restores(rows),
            )
            write_table(out, FUZZ, rows, info)
    plot_schedules(out)
    for outcome in failed[:3]:
        make_smaller(outcome.schedule)
    return len(failed)


def _settings(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / f"{FUZZ.name}.json").read_text())["settings"])


def _minutes_before(out: Path, rows: list[Row]) -> float:
    return float(_settings(out)["minutes"]) if rows else 0.0


def _counts_before(out: Path, rows: list[Row]) -> Counter[str]:
    return Counter(_settings(out).get("counts", {})) if rows else Counter()


def join(folders: list[Path], out: Path) -> int:
    """Write what several folders hold as one record, with how each part of it ran; return how many schedules failed."""
    rows = sorted((row for folder in folders for row in read_table(folder, FUZZ)), key=lambda row: int(row["seed"]))
    parts = [json.loads((folder / f"{FUZZ.name}.json").read_text()) for folder in folders]
    failed = [row["seed"] for row in rows if row["violations"]]
    info = run_info(
        first=rows[0]["seed"],
        minutes=max(part["settings"]["minutes"] for part in parts),
        side_by_side=[
            {"first": part["settings"]["first"], **{name: part[name] for name in ("commit", "date")}} for part in parts
        ],
        failed_seeds=failed,
        totals=totals(rows),
        counts=dict(sum((Counter(_settings(folder).get("counts", {})) for folder in folders), Counter())),
        shares=shares(rows),
        restores=restores(rows),
    )
    write_table(out, FUZZ, rows, {**info, "commit": parts[0]["commit"]})
    plot_schedules(out)
    print(f"{len(rows)} schedules, {len({row['seed'] for row in rows})} seeds, {len(failed)} failed: {failed}")
    return len(failed)


def tell_failure(outcome: Outcome) -> None:
    """Print what went wrong and how to see it again."""
    seed = outcome.schedule.seed
    print(f"seed {seed} fails; again with: python -m tests.fuzz --replay {seed}", flush=True)
    for problem in outcome.verdict.problems[:5]:
        print(f"  {problem[:1500]}", flush=True)


def make_smaller(schedule: Schedule) -> None:
    """Print the smallest failing schedule that can be found, and keep it in a file."""
    path = FOLDER / f"seed-{schedule.seed}.json"
    small = shrink(schedule, do_fail)
    small.save(path)
    print(f"seed {schedule.seed}, made smaller: python -m tests.fuzz --file {path}\n{small.to_json()}", flush=True)


def replay(schedules: list[Schedule]) -> int:
    """Run schedules again, tell what went wrong; return how many failed."""
    failed = 0
    for outcome in run_and_check(schedules):
        print(f"seed {outcome.schedule.seed}: {row_of(outcome)}")
        if outcome.verdict.problems:
            failed += 1
            tell_failure(outcome)
    return failed


def main() -> int:
    """Run from the command line."""
    parser = benchmark_parser(__doc__, smoke="two schedules; into .cache/fuzz unless told otherwise")
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--of-each", type=int, default=BLOCK, help="schedules of each server, default %(default)s")
    parser.add_argument("--go-on", action="store_true", help="after the schedules that the folder's fuzz.csv has")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--replay", type=int, metavar="SEED")
    parser.add_argument("--block", action="store_true", help="with --replay: all schedules of its server up to it")
    parser.add_argument("--file", type=Path, metavar="FILE")
    parser.add_argument("--shrink", type=int, metavar="SEED")
    options = parser.parse_args()
    if options.replay is not None:
        first = options.replay // BLOCK * BLOCK if options.block else options.replay
        return min(replay([schedule_of(seed) for seed in range(first, options.replay + 1)]), 1)
    if options.file is not None:
        return min(replay([Schedule.from_json(options.file.read_text())]), 1)
    if options.shrink is not None:
        make_smaller(schedule_of(options.shrink))
        return 0
    if options.smoke:
        vars(options).update(SMOKE, out=options.out or FOLDER)
    out = options.out or hardware_folder()
    if options.join:
        return min(join(options.join, out), 1)
    rows = read_table(out, FUZZ) if options.go_on and (out / f"{FUZZ.name}.csv").exists() else []
    return min(record(seeds_of(options.first, options.schedules, options.of_each), out, rows), 1)


if __name__ == "__main__":
    sys.exit(main())
