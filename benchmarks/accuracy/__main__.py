"""How many problems does a model solve with and without a KV policy, and at what cost?

    python -m benchmarks.accuracy --model M --problems FILE_OR_DATASET [--settings none,rkv:1024:128]
        [--split test] [--subset NAME] [--limit N] [--samples 4] [--max-tokens 16384] [--temperature 0.6] [--top-p 0.95]
        [--concurrency 64] [--server-args "--tp 2"] [--answered] [--out FOLDER] [--work FOLDER]
    python -m benchmarks.accuracy --collected FILE --problems FILE --out FOLDER
    python -m benchmarks.accuracy --smoke
    python -m benchmarks.accuracy --plot-only FOLDER

Problems are JSON lines with the fields problem (or question) and answer, as MATH-500, AIME 2024 and GSM8K have them, or
the name of a data set of the Hugging Face hub (needs the package ``datasets``). Each setting gets a server of its own,
one after the other; every problem is asked ``--samples`` times through ``/v1/chat/completions``, ``--concurrency`` at a
time. Answers are judged by ``math-verify``; see ``checker.py`` for what counts as an answer. One on which it spends ten
seconds of a CPU is unjudged: a column of its own, not right and not wrong.

Every finished sample is kept in ``--work``, one line each, and an interrupted run goes on behind it; so does one with
more problems or samples. A run with anything else changed (model, versions, sampling, flags, hardware) starts anew.
``--answered`` asks nothing: it shows what there is so far, of the problems that every setting has answered. Short
answers come first, so that these are not all alike.

Two measures, over problems: *right* (pass@1), the share of their samples that are right; and *kept*, the share of those
with the same final answer as the sample of ``none`` of that number, right or wrong. Every problem counts: where
``none`` gives no answer that can be read, kept is who gives none either (the table says how many these are). Kept is
meant for greedy answers: of two that are drawn, the full cache's own differ, too.

``--collected`` asks nothing either: it judges the answers that ``benchmarks.accuracy.collect`` brought from a GPU, of
all settings in its file or of ``--settings``, and what is said of the run is what was said there.

Writes ``accuracy.csv`` (one row a setting; columns in ``common/tables.py``), ``accuracy.json`` and ``accuracy.png``,
and prints the table. Where a variant of a policy has several budgets, it also writes ``accuracy_pooled.csv``, of each
problem the mean over them, and its picture: budgets tell more together than each alone.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.answer_file import judge_answers, read_answers
from benchmarks.accuracy.judge import Judge
from benchmarks.accuracy.kept import compare_answers
from benchmarks.accuracy.pooled import pooled_rows
from benchmarks.accuracy.problems import DRY_RUN_PROBLEMS, Problem, load_problems
from benchmarks.accuracy.report import markdown, plot, plot_pooled, pooled_markdown
from benchmarks.accuracy.rows import ByProblem, accuracy_rows
from benchmarks.accuracy.run import INSTRUCTION, Sampling, run_samples, setting_server
from benchmarks.accuracy.store import SampleStore
from benchmarks.common.arguments import add_model_arguments, benchmark_parser, refuse_less_than_one
from benchmarks.common.schema import hardware_folder, run_info, write_table
from benchmarks.common.settings import Setting, parse_setting, without_sizes
from benchmarks.common.tables import ACCURACY, ACCURACY_POOLED
from devtools.launch import ServerError, exit_on_first_signal, has_gpu
from rkv_sglang.config import NO_POLICY

SETTINGS = "none,rkv:1024:128"
# What one of the hours is an hour of, by whether there is an accelerator.
DEVICE = {True: "GPU", False: "machine"}
SMOKE = {"settings": "none,rkv:24:8,rkv:32:8", "limit": 3, "samples": 2, "max_tokens": 64, "concurrency": 6}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options, the settings parsed."""
    parser = benchmark_parser(__doc__, smoke="dry run: 3 problems, 2 short samples, 2 settings")
    add_model_arguments(parser, work=Path(".cache/accuracy"))
    parser.add_argument("--problems", default=str(DRY_RUN_PROBLEMS), help="file or data set, default %(default)s")
    parser.add_argument("--split", default="test", help="of a data set of the hub, default %(default)s")
    parser.add_argument("--subset", help="of a data set of the hub, such as main")
    parser.add_argument("--limit", type=int, help="ask only the first so many problems")
    parser.add_argument("--settings", help=f"comma-separated, default {SETTINGS}; with --collected: all of the file")
    parser.add_argument(
        "--control",
        default="",
        help="setting to hold all others against, or one without budget and buffer, such as rkv:window=32, which is "
        "then taken at the budget and buffer of each; default: random_attention with the same budget, "
        "if possible of the same granularity and window",
    )
    parser.add_argument("--samples", type=int, default=4, help="of every problem, default %(default)s")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of an answer, default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.6, help="default %(default)s")
    parser.add_argument("--top-p", type=float, default=0.95, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="used by servers that honour seeds, default %(default)s")
    parser.add_argument("--instruction", default=INSTRUCTION, help="follows every problem, default %(default)r")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time, default %(default)s")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one answer, default %(default)s")
    parser.add_argument(
        "--collected", type=Path, metavar="FILE", help="judge what benchmarks.accuracy.collect has written"
    )
    parser.add_argument("--answered", action="store_true", help="only show what is there, and start no server")
    parser.add_argument("--server-args", default="", help="further flags of every server, in one string")
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE, out=options.out or options.work / "smoke")
    refuse_less_than_one(parser, options, "samples", "max_tokens", "concurrency", "limit")
    if options.settings is None:
        options.settings = "" if options.collected else SETTINGS
    try:
        options.settings = list(dict.fromkeys(parse_setting(text) for text in options.settings.split(",") if text))
        options.server_args = shlex.split(options.server_args)
    except ValueError as error:
        parser.error(str(error))
    if options.collected and options.out is None:
        parser.error("--collected needs --out: this machine is not where the answers are from")
    if options.settings and (problem := _control_problem(options.control, options.settings)):
        parser.error(problem)
    return options


def _control_problem(control: str, settings: Collection[Setting]) -> str | None:
    """Return one line on what is wrong with ``--control``, for which these are all settings."""
    known = {name for setting in settings for name in (setting.name, without_sizes(setting.name))}
    if not control or control in known - {NO_POLICY}:
        return None
    return f"--control {control} must be one of --settings, with or without its budget and buffer"


def make_store(options: argparse.Namespace, setting: Setting, sampling: Sampling) -> SampleStore:
    """Open the samples of a setting; what is in the description here decides which runs belong together."""
    info = run_info()
    hardware = {name: value for name, value in info["hardware"].items() if name != "memory_gib"}
    description = {
        "model": options.model,
        "setting": setting.name,
        "sampling": vars(sampling),
        "concurrency": options.concurrency,
        "server_args": options.server_args,
        "versions": info["versions"],
        "hardware": hardware,
    }
    return SampleStore(options.work, setting.name, description)


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Return how every problem is asked."""
    return Sampling(
        instruction=options.instruction,
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def measure(options: argparse.Namespace, problems: Sequence[Problem], judge: Judge) -> dict[Setting, ByProblem]:
    """Have every setting answer what it has not answered yet; return all samples asked for."""
    sampling = sampling_of(options)
    stores = {setting: make_store(options, setting, sampling) for setting in options.settings}
    if options.answered:
        problems = _answered(stores.values(), problems, options.samples)
    # All problems once before any of them twice, so that an interrupted run has seen many.
    wanted = [(problem, sample) for sample in range(options.samples) for problem in problems]
    for setting, store in stores.items():
        todo = [(problem, sample) for problem, sample in wanted if (problem.key, sample) not in store.samples]
        kept = len(wanted) - len(todo)
        print(f"{setting.name}: {len(todo)} samples to go, {kept} kept from earlier runs ({store.path})", flush=True)
        if todo:
            with setting_server(options.model, setting, options.server_args, Path(".cache/logs")) as server:
                run_samples(server, store, todo, sampling, options.concurrency, options.timeout, judge)
    return {
        setting: {
            problem.key: [store.samples[problem.key, sample] for sample in range(options.samples)]
            for problem in problems
        }
        for setting, store in stores.items()
    }


def _answered(stores: Collection[SampleStore], problems: Sequence[Problem], num_samples: int) -> list[Problem]:
    """Return the problems of which every store has all samples.

    Raises:
        ValueError: There are none; one line.
    """
    numbers = range(num_samples)
    found = [
        problem
        for problem in problems
        if all((problem.key, number) in store.samples for store in stores for number in numbers)
    ]
    if not found:
        raise ValueError("no problem has been answered under every setting: leave out --answered, or some settings")
    return found


def judge_collected(
    options: argparse.Namespace, problems: Sequence[Problem], judge: Judge
) -> tuple[dict[Setting, ByProblem], dict[str, Any]]:
    """Return the judged answers of a file, of all its settings unless some are named, and what it says of its run."""
    info, answers = read_answers(options.collected)
    wanted = options.settings or sorted(answers, key=_place)
    if missing := [setting.name for setting in wanted if setting not in answers]:
        raise ValueError(f"{options.collected} has no answers of {', '.join(missing)}: leave them out of --settings")
    if problem := _control_problem(options.control, wanted):
        raise ValueError(problem)
    return judge_answers({setting: answers[setting] for setting in wanted}, problems, judge), info


def _place(setting: Setting) -> tuple[bool, str, str, int, int]:
    """Return where a setting stands in a table: policies by name, of each its variants, of these the smallest first."""
    return setting.policy != NO_POLICY, setting.policy, without_sizes(setting.name), setting.budget, setting.buffer


def write_results(
    options: argparse.Namespace, results: dict[Setting, ByProblem], judge: Judge, asked: dict[str, Any] | None = None
) -> None:
    """Write the CSV, its JSON and the plot, and print the table.

    Args:
        asked: What is known of the run, where another machine asked.
    """
    dataset = Path(options.problems).name if Path(options.problems).exists() else options.problems
    full = next((by for setting, by in results.items() if setting.policy == NO_POLICY), None)
    kept = {setting: compare_answers(judge, by, full) for setting, by in results.items()} if full else None
    rows = accuracy_rows(dataset, results, kept, options.control)
    if asked is not None:
        # Servers shared the GPU, and settings a server.
        rows = [{**row, "seconds": math.nan, "correct_per_hour": math.nan} for row in rows]
    settings = {**vars(options), "settings": [setting.name for setting in results]}
    settings["problems"] = dataset
    info = run_info(**{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()})
    if asked is not None:
        info = {**asked, "judged": {name: info[name] for name in ("command", "commit", "date", "settings")}}
    info["device_of_an_hour"] = DEVICE[has_gpu() or asked is not None]
    out = options.out or hardware_folder()
    write_table(out, ACCURACY, rows, info)
    print(f"\n{markdown(rows, info['device_of_an_hour'], options.control)}\n\n{plot(out)}")
    over_budgets = pooled_rows(dataset, results, kept, options.control) if kept else []
    for old in out.glob(f"{ACCURACY_POOLED.name}.*"):
        # It may be of other settings.
        old.unlink()
    if over_budgets:
        write_table(out, ACCURACY_POOLED, over_budgets, info)
        print(f"\n{pooled_markdown(over_budgets)}\n\n{plot_pooled(out)}")


def main() -> int:
    """Run the benchmark from the command line."""
    options = parse_arguments()
    if options.plot_only:
        print(plot(options.plot_only))
        if (options.plot_only / f"{ACCURACY_POOLED.name}.csv").exists():
            print(plot_pooled(options.plot_only))
        return 0
    exit_on_first_signal()
    try:
        problems = load_problems(options.problems, options.split, options.subset)[: options.limit]
        with Judge() as judge:
            for problem in problems:
                # An answer that cannot be read must not end the run hours later.
                judge.require(problem.answer)
            if options.collected:
                results, asked = judge_collected(options, problems, judge)
                write_results(options, results, judge, asked)
            else:
                write_results(options, measure(options, problems, judge), judge)
    except (ServerError, ValueError, ModuleNotFoundError) as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
