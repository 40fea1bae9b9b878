"""Programs of SGLang's frontend language on a server without and with a policy: what stays the same?

    python -m benchmarks.frontend_programs [--model M] [--budget 64] [--buffer 16] [--out FOLDER] [--smoke]

Programs generate, fork, select and take turns, greedily: the *short* ones never hold budget + buffer generated tokens,
the *long* ones pass that in every answer. Both servers run each program twice, from an empty prefix cache on; texts are
those of the first run, requests those of both. A policy must not change a program's structure: the same variables, the
same number of requests, choices of the same set, the same prefix hits for the same prompts (of a program that
forks, in its second run: in the first, what a branch hits depends on which comes first), and the same texts as long as
nothing was compacted. Exit status 1 if one of these differs.

From the first compaction on, texts may differ. A prompt that goes on behind a compacted answer hits the prefix cache up
to the end of that answer's prompt only, because compacted KV is not put there.

Writes ``frontend.csv`` (one row a program and server; columns in ``tables.py``), its JSON and ``frontend.png``.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sglang as sgl

from benchmarks.frontend_report import frontend_rows, markdown, plot
from benchmarks.frontend_run import ProgramRun, run_program, structure_differences
from benchmarks.schema import hardware_folder, run_info, write_table
from benchmarks.tables import FRONTEND
from devtools.launch import ServerError, exit_on_sigterm, launched_server

SMALL_MODEL = ".cache/models/SmolLM2-135M-Instruct"
SMOKE = {"budget": 32, "buffer": 8}
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


def measure(options: argparse.Namespace, programs: Sequence[Program]) -> dict[str, dict[str, ProgramRun]]:
    """Return by server (none, rkv) and program what it gave; the servers run one after the other."""
    settings = {
        "none": (),
        "rkv": ("--kv-policy", "rkv", "--rkv-budget", str(options.budget), "--rkv-buffer", str(options.buffer)),
    }
    runs: dict[str, dict[str, ProgramRun]] = {}
    for setting, flags in settings.items():
        with launched_server(options.model, *flags, log_path=Path(f".cache/logs/frontend_{setting}.log")) as server:
            for program in programs:
                print(f"{setting}: {program.name} ...", flush=True)
                run = run_program(
                    server.url, program.function, program.variables, tuple(program.choices), forks=program.forks
                )
                runs.setdefault(setting, {})[program.name] = run
    return runs


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMALL_MODEL, help="folder or hub name, default %(default)s")
    parser.add_argument("--budget", type=int, default=64, help="--rkv-budget, default %(default)s")
    parser.add_argument("--buffer", type=int, default=16, help="--rkv-buffer, default %(default)s")
    parser.add_argument("--out", type=Path, help="folder of the results, default benchmarks/results/HARDWARE")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model; into .cache/frontend")
    options = parser.parse_args()
    if options.smoke:
        from devtools.tiny_models import tiny_model_path

        vars(options).update(SMOKE, model=str(tiny_model_path("llama-gqa")), out=options.out or Path(".cache/frontend"))
    exit_on_sigterm()
    programs = all_programs(options.budget, options.buffer)
    try:
        runs = measure(options, programs)
    except (ServerError, RuntimeError) as error:
        print(f"frontend_programs: {error}", file=sys.stderr)
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
        print(f"frontend_programs: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
