"""Programs of SGLang's frontend language on a server without and with a policy: what stays the same?

    python -m benchmarks.frontend [--model M] [--budget 64] [--buffer 16] [--out FOLDER] [--smoke]

Programs generate, fork, select and take turns, greedily: the *short* ones never hold budget + buffer generated tokens,
the *long* ones pass that in every answer. Both servers run each program twice, from an empty prefix cache on; texts are
those of the first run, requests those of both. A policy must not change a program's structure: the same variables, the
same number of requests, choices of the same set, the same prefix hits for the same prompts (of a program that
forks, in its second run: in the first, what a branch hits depends on which comes first), and the same texts as long as
nothing was compacted. Exit status 1 if one of these differs.

From the first compaction on, texts may differ. A prompt that goes on behind a compacted answer hits the prefix cache up
to the end of that answer's prompt only, because compacted KV is not put there.

Writes ``frontend.csv`` (one row a program and server; columns in ``common/tables.py``), its JSON and ``frontend.png``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.arguments import SMALL_MODEL, benchmark_parser
from benchmarks.common.schema import hardware_folder, run_info, write_table
from benchmarks.common.settings import no_policy, policy_setting
from benchmarks.common.tables import FRONTEND
from benchmarks.frontend.programs import Program, all_programs
from benchmarks.frontend.report import markdown, plot
from benchmarks.frontend.rows import frontend_rows
from benchmarks.frontend.run import ProgramRun, run_program, structure_differences
from devtools.launch import ServerError, exit_on_first_signal, launched_server

SMOKE = {"budget": 32, "buffer": 8}


def measure(options: argparse.Namespace, programs: Sequence[Program]) -> dict[str, dict[str, ProgramRun]]:
    """Return by server (none, rkv) and program what it gave; the servers run one after the other."""
    settings = (no_policy(), policy_setting("rkv", options.budget, options.buffer, name="rkv"))
    runs: dict[str, dict[str, ProgramRun]] = {}
    for setting in settings:
        log_path = Path(f".cache/logs/frontend_{setting.name}.log")
        with launched_server(options.model, *setting.flags, log_path=log_path) as server:
            for program in programs:
                print(f"{setting.name}: {program.name} ...", flush=True)
                run = run_program(
                    server.url, program.function, program.variables, tuple(program.choices), forks=program.forks
                )
                runs.setdefault(setting.name, {})[program.name] = run
    return runs


def main() -> int:
    """Run from the command line."""
    parser = benchmark_parser(__doc__, smoke="a tiny random model; into .cache/frontend")
    parser.add_argument("--model", default=SMALL_MODEL, help="folder or hub name, default %(default)s")
    parser.add_argument("--budget", type=int, default=64, help="--kv-budget, default %(default)s")
    parser.add_argument("--buffer", type=int, default=16, help="--kv-buffer, default %(default)s")
    options = parser.parse_args()
    if options.smoke:
        from devtools.tiny_models import BENCHMARK_MODEL, tiny_model_path

        vars(options).update(
            SMOKE, model=str(tiny_model_path(BENCHMARK_MODEL)), out=options.out or Path(".cache/frontend")
        )
    exit_on_first_signal()
    programs = all_programs(options.budget, options.buffer)
    try:
        runs = measure(options, programs)
    except (ServerError, RuntimeError) as error:
        print(f"frontend: {error}", file=sys.stderr)
        return 1
    rows = frontend_rows(runs["none"], runs["rkv"], options.budget, options.buffer)
    out = options.out or hardware_folder()
    write_table(out, FRONTEND, rows, run_info(model=Path(options.model).name, smoke=options.smoke))
    print(f"\n{markdown(rows)}\n\n{plot(out)}")
    wrong = [
        f"{program.name}: {line}"
        for program in programs
        for line in structure_differences(runs["none"][program.name], runs["rkv"][program.name], program.choices)
    ]
    for line in wrong:
        print(f"frontend: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
