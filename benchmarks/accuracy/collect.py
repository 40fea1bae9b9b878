"""The answers of many settings to the same problems, from servers side by side on one GPU, for the accuracy benchmark.

    python -m benchmarks.accuracy.collect --model M --problems FILE --settings none rkv:64:32 rkv:128:32 ... | @FILE
        [--limit N] [--max-tokens 768] [--concurrency 256] [--servers 12] [--flags "..."] [--out FOLDER] [--smoke]

Settings that differ in budget and buffer alone share one server: each request names its own, in ``custom_params``.
``--servers`` run at a time; one that is done makes room for the next. Greedy, one answer a problem. ``@FILE`` reads
arguments from a file, one a line.

Nothing is judged here, as ``math-verify`` may be missing where the GPU is: the answers lie in
``accuracy_answers.jsonl.gz`` as they came, and

    python -m benchmarks.accuracy --collected FILE --problems FILE --out FOLDER

makes the table of them, of all problems that every setting has answered. Written after every few answers, so that a run
that is cut off keeps what it has. Ends with status 1 if a server failed.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from benchmarks.accuracy.answer_file import AnswerFile
from benchmarks.accuracy.problems import DRY_RUN_PROBLEMS, Problem, load_problems
from benchmarks.accuracy.run import INSTRUCTION, Sampling, ask_server, collect_sample, num_devices, setting_server
from benchmarks.common.arguments import SMALL_MODEL, benchmark_parser, refuse_less_than_one, refuse_to_overwrite
from benchmarks.common.asking import ask_side_by_side, ended_with_its_processes
from benchmarks.common.schema import hardware_folder, run_info
from benchmarks.common.settings import Setting, parse_setting
from devtools.launch import ServerError, exit_on_first_signal, has_gpu

FILE_NAME = "accuracy_answers.jsonl.gz"
SMOKE: dict[str, Any] = {
    "settings": ["none", "rkv:24:8", "rkv:32:8"],
    "limit": 3,
    "max_tokens": 48,
    "servers": 2,
}
GPU_FLAGS = (
    *("--dtype", "float16", "--attention-backend", "triton", "--mem-fraction-static", "0.9"),
    *("--max-total-tokens", "200000", "--max-running-requests", "256", "--cuda-graph-max-bs-decode", "256"),
)
# Of one answer, with many others beside it, and on a CPU.
TIMEOUT_S = 3600


def by_server(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Return the settings in groups that one server answers: alike in all but budget and buffer."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        alike = asdict(setting.config) if setting.config else {}
        groups.setdefault(str({**alike, "budget": 0, "buffer": 0}), []).append(setting)
    return list(groups.values())


def body_of(setting: Setting, problem: Problem, sampling: Sampling) -> dict[str, Any]:
    """Return the request for a problem under a setting, whichever of its group the server was started with."""
    body = sampling.request(problem, 0)
    if setting.config is not None:
        body["custom_params"] = {"kv_budget": setting.budget, "kv_buffer": setting.buffer}
    return body


def answer_group(
    group: Sequence[Setting], problems: Sequence[Problem], options: argparse.Namespace, answers: AnswerFile
) -> None:
    """Have one server answer all problems under every setting of a group.

    Raises:
        ServerError: It did not start, or a request failed.
    """
    sampling = Sampling(
        instruction=INSTRUCTION, temperature=0, top_p=1, max_tokens=options.max_tokens, seed=options.seed
    )
    largest = max(group, key=lambda setting: setting.budget + setting.buffer)
    # A run that is cut off has answered the same problems under all settings.
    wanted = [(setting, problem) for problem in problems for setting in group]
    with setting_server(options.model, largest, options.server_flags, options.out) as server:
        devices = num_devices(server)

        def ask(job: tuple[Setting, Problem]) -> Any:
            return ask_server(server, body_of(*job, sampling), TIMEOUT_S)

        for (setting, problem), answer in ask_side_by_side(ask, wanted, options.concurrency):
            answers.add(setting, collect_sample(problem, 0, devices, *answer))


def run_all(
    groups: Sequence[Sequence[Setting]], problems: Sequence[Problem], options: argparse.Namespace, answers: AnswerFile
) -> list[str]:
    """Run all groups, some at a time, and return one line for each that failed."""
    failed = []
    with ThreadPoolExecutor(options.servers) as pool, ended_with_its_processes(pool):
        running = {pool.submit(answer_group, group, problems, options, answers): group for group in groups}
        for number, done in enumerate(as_completed(running), start=1):
            names = " ".join(setting.name for setting in running[done])
            error = done.exception()
            if error is not None and not isinstance(error, ServerError):
                raise error
            print(f"{number} of {len(groups)}: {names} ... {error or 'answered'}", flush=True)
            if error is not None:
                failed.append(f"{names}: {error}")
    return failed


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options, the settings parsed."""
    parser = benchmark_parser(__doc__, smoke="3 problems, short answers, 2 servers; needs --out")
    parser.fromfile_prefix_chars = "@"
    parser.add_argument("--model", default=SMALL_MODEL, help="folder or hub name, default %(default)s")
    parser.add_argument("--problems", default=str(DRY_RUN_PROBLEMS), help="file, default %(default)s")
    parser.add_argument("--limit", type=int, help="ask only the first so many problems")
    parser.add_argument("--settings", nargs="+", default=["none", "rkv:1024:128"], help="default %(default)s")
    parser.add_argument("--max-tokens", type=int, default=768, help="of an answer, default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--concurrency", type=int, default=256, help="requests of one server, default %(default)s")
    parser.add_argument("--servers", type=int, default=12, help="at a time, default %(default)s")
    parser.add_argument("--flags", default="", help="further flags of all servers, in one string")
    options = parser.parse_args()
    if options.smoke:
        refuse_to_overwrite(parser, options)
        vars(options).update(SMOKE)
    refuse_less_than_one(parser, options, "limit", "max_tokens", "concurrency", "servers")
    options.out = options.out or hardware_folder()
    try:
        options.parsed = list(dict.fromkeys(map(parse_setting, options.settings)))
        options.server_flags = (*(GPU_FLAGS if has_gpu() else ()), *shlex.split(options.flags))
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> int:
    """Run from the command line."""
    options = parse_arguments()
    exit_on_first_signal()
    try:
        problems = load_problems(options.problems)[: options.limit]
        groups = by_server(options.parsed)
        given = {name: value for name, value in vars(options).items() if name != "parsed"}
        info = run_info(**{name: str(value) for name, value in given.items()})
        print(f"{len(options.parsed)} settings on {len(groups)} servers, {len(problems)} problems", flush=True)
        with AnswerFile(options.out / FILE_NAME, info) as answers:
            failed = run_all(groups, problems, options, answers)
    except ValueError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 1
    for line in failed:
        print(f"accuracy: {line}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
