"""On a real server: are all decode steps replayed CUDA graphs, are tokens the same under all schedules, and step times.

    python -m benchmarks.gpu.serve_check [--out FOLDER] [--batches 1 64] [--prompt-len 512] [--num-tokens 1300]
        [--settings rkv:1024:128 rkv:1024:128:granularity=request] [--model PATH]
        [--flags "--attention-backend flashinfer"] [--smoke]

Without ``--model`` it serves the shape of Llama-3.1-8B with made-up weights (``weights/``). First the races: for every
setting three servers (as it is, with SGLang's coarse write-after-read barrier, and without overlap scheduling) get the
same requests at once, with many compactions of small budgets and of prompts, and all must give the same tokens: where
they differ, compaction and a forward pass raced for the index map. A server without a policy must give others. Of the
made-up model they serve the first layers only, so that steps are short. Then one server of each setting and one without
a policy get every batch size. Step times are SGLang's own, from its decode log. Servers start side by side where the
GPU has room.

Ends with status 1 if tokens differ, if a step was not a replayed graph (on a GPU), or if an answer is not as long or
not as often compacted as it must be. Writes ``races.csv`` and ``serve_check.csv`` after every row, their ``.json``,
``serve_check.png``, and the servers' logs.
"""

import argparse
import contextlib
import random
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import benchmark_parser, refuse_to_overwrite
from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, Table, hardware_folder, read_table, run_info, write_table
from benchmarks.common.settings import Setting, as_file_name, no_policy, parse_setting
from benchmarks.common.statistics import compactions_before
from benchmarks.common.tables import RACES, SERVE_CHECK
from benchmarks.gpu.decode_log import figures_of, read_steps
from benchmarks.gpu.llama_shape import VOCAB_SIZE, served_model
from benchmarks.gpu.races import Race, racing_settings
from benchmarks.gpu.side_by_side import groups_that_fit, servers_side_by_side
from devtools.launch import Server, ServerError, exit_on_first_signal, has_gpu
from rkv_sglang.config import NO_POLICY

# Tiny model and sizes, with or without a GPU.
SMOKE: dict[str, Any] = {
    "batches": [1, 4],
    "prompt_len": 16,
    "num_tokens": 150,
    "race_requests": 6,
    "race_tokens": 120,
}
SETTINGS = ("rkv:1024:128", "rkv:1024:128:granularity=request")
SMOKE_SETTINGS = ("rkv:32:16",)
RACE_LAYERS = 8
# What a server of all layers takes at the default sizes, and one of a race.
STEPS_GIB, RACE_GIB = 38.0, 12.0
# The first batch builds what is built lazily, and fills no graph that a later one needs.
WARM_UP_TOKENS = 16
# Slots beside those that are needed.
SPARE = 2048
GPU_FLAGS = (
    *("--dtype", "bfloat16", "--attention-backend", "triton", "--mem-fraction-static", "0.9"),
    *("--context-length", "16384", "--cuda-graph-max-bs-decode", "64", "--max-running-requests", "64"),
)


@dataclass
class Results:
    """What is known so far; written after every row."""

    folder: Path
    info: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    races: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, table: Table, row: Row, wrong: list[str]) -> None:
        """Keep a row of ``SERVE_CHECK`` or ``RACES``."""
        rows = self.rows if table is SERVE_CHECK else self.races
        rows.append(row)
        self.problems += wrong
        print("\n".join([str(row), *wrong]), flush=True)
        write_table(self.folder, table, rows, {**self.info, "problems": self.problems})


def measure(server: Server, setting: Setting, batch_size: int, options: argparse.Namespace) -> tuple[Row, list[str]]:
    """Return the row of one batch size, and what is wrong with it."""
    rng = random.Random(batch_size)
    prompts = [[rng.randrange(3, options.vocab_size) for _ in range(options.prompt_len)] for _ in range(batch_size)]
    server.generate([prompt[:8] for prompt in prompts], WARM_UP_TOKENS)
    offset = server.log_path.stat().st_size
    start = time.perf_counter()
    answers = server.generate(prompts, options.num_tokens)
    seconds = time.perf_counter() - start
    # The last lines may be a moment behind the answer.
    time.sleep(1)
    steps = read_steps(server.log_since(offset))
    sizes = {name: getattr(options, name) for name in ("prompt_len", "num_tokens")}
    row = {"setting": setting.name, "batch_size": batch_size, **sizes, "seconds": round(seconds, 3)}
    row |= {"budget": setting.budget, "buffer": setting.buffer}
    row |= figures_of(steps, batch_size)
    row["tokens_per_s"] = round(batch_size * options.num_tokens / seconds, 1)
    row["compactions"] = sum(int(answer["meta_info"].get("kv_compactions", 0)) for answer in answers)
    return row, wrong_with(row, answers, options)


def wrong_with(row: Row, answers: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Return one line for each thing that must not be."""
    where = f"{row['setting']}, batch {row['batch_size']}"
    problems = []
    expected = 0
    if row["setting"] != NO_POLICY:
        expected = len(answers) * compactions_before(options.num_tokens - 1, int(row["budget"]), int(row["buffer"]))
    if row["compactions"] != expected:
        problems.append(f"{where}: {row['compactions']} compactions instead of {expected}")
    if has_gpu() and row["graph_steps"] != row["steps"]:
        problems.append(f"{where}: {int(row['steps']) - int(row['graph_steps'])} of {row['steps']} steps ran no graph")
    if row["steps"] == 0:
        problems.append(f"{where}: no decode line was found in the server's log")
    return problems


def run_races(options: argparse.Namespace, results: Results) -> None:
    """Run all servers that race, a policy's after one another's."""
    races = {setting.name: Race(setting, options) for setting in options.policies}
    # On a CPU the barrier does nothing, and a server more takes a minute.
    step = 1 if has_gpu() else 2
    racing = [
        (races[setting.name], server) for setting in options.policies for server in racing_settings(setting)[::step]
    ]
    # Against the first policy's tokens.
    racing.append((races[options.policies[0].name], no_policy()))
    race_of = {setting: race for race, setting in racing}
    model, flags, environment = served(options, num_layers=RACE_LAYERS)
    flags += ["--max-total-tokens", str(options.race_requests * (options.prompt_len + options.race_tokens) + SPARE)]
    for group in groups_that_fit(list(race_of), RACE_GIB):
        with running(group, "race", results, model, flags, environment) as servers:
            for setting, server in servers.items():
                # The first server twice: what differs there is no matter of the schedule.
                for number in range(2 if race_of[setting].expected is None else 1):
                    results.add(RACES, *race_of[setting].run(server, setting, number))


def run_steps(options: argparse.Namespace, results: Results) -> None:
    """Run one server of each setting, and one without a policy."""
    model, flags, environment = served(options)
    room = max(options.batches) * (options.prompt_len + options.num_tokens) + SPARE
    flags += ["--max-total-tokens", str(room), "--decode-log-interval", "1"]
    for group in groups_that_fit([*options.policies, no_policy()], STEPS_GIB):
        with running(group, "steps", results, model, flags, environment) as servers:
            for setting, server in servers.items():
                for batch_size in options.batches:
                    results.add(SERVE_CHECK, *measure(server, setting, batch_size, options))


def served(options: argparse.Namespace, num_layers: int | None = None) -> tuple[str, list[str], dict[str, str]]:
    """Return the model, the flags and the environment of all servers."""
    model, made_up, environment = served_model(options.model, options.work, tiny=options.smoke, num_layers=num_layers)
    return model, [*(GPU_FLAGS if has_gpu() else ()), *made_up, *shlex.split(options.flags)], environment


@contextlib.contextmanager
def running(
    group: Sequence[Setting],
    kind: str,
    results: Results,
    model: str,
    flags: Sequence[str],
    environment: Mapping[str, str],
) -> Iterator[dict[Setting, Server]]:
    """Run servers side by side, and say so."""
    print(f"{kind}: starting {len(group)} servers ...", flush=True)
    start = time.perf_counter()
    logs = {setting: results.folder / f"{kind}_{as_file_name(setting.name)}.log" for setting in group}
    with servers_side_by_side(model, flags, logs, environment) as servers:
        print(f"{kind}: ready after {time.perf_counter() - start:.0f} s", flush=True)
        yield servers


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows, the policy beside none, as a Markdown table."""
    lines = [
        "| batch | setting | tokens/s | step p50 ms | p99 | compacting p50 | p99 | around p50 | graph steps |",
        "|---" * 9 + "|",
    ]
    for row in sorted(rows, key=lambda row: (int(row["batch_size"]), str(row["setting"]))):
        shown = [row["tokens_per_s"], row["step_p50_ms"], row["step_p99_ms"]]
        shown += [row[f"{name}_ms"] for name in ("compacting_p50", "compacting_p99", "around_p50")]
        shown.append(f"{row['graph_steps']}/{row['steps']}")
        lines.append(f"| {row['batch_size']} | {row['setting']} | " + " | ".join(map(str, shown)) + " |")
    return "\n".join(lines)


def plot(folder: Path) -> Path:
    """Draw ``serve_check.png`` from the CSV in ``folder``: step times, one group of bars a batch size."""
    pyplot = load_pyplot()
    rows = read_table(folder, SERVE_CHECK)
    sizes = sorted({int(row["batch_size"]) for row in rows})
    figure, places = pyplot.subplots(1, len(sizes), figsize=(4 * len(sizes), 3), layout="constrained", squeeze=False)
    names = ("step_p50_ms", "step_p99_ms", "compacting_p50_ms", "compacting_p99_ms")
    for axes, size in zip(places[0], sizes, strict=True):
        mine = [row for row in rows if row["batch_size"] == size]
        for i, row in enumerate(mine):
            xs = [place + 0.4 * i for place in range(len(names))]
            axes.bar(xs, [float(row[name]) for name in names], 0.4, label=str(row["setting"]))
        axes.set_xticks(
            [place + 0.2 for place in range(len(names))], [n.removesuffix("_ms") for n in names], fontsize=7
        )
        axes.set(title=f"batch {size}", ylabel="ms")
        axes.legend()
    path = folder / "serve_check.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


PARTS = {"races": run_races, "steps": run_steps}


def main() -> int:
    """Run the check from the command line."""
    parser = benchmark_parser(__doc__, smoke="a tiny model and short answers; needs --out")
    parser.add_argument("--model", help="folder or hub name; default: the shape of Llama-3.1-8B, dummy weights")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="prompts are random ids below it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="requests at once")
    parser.add_argument("--settings", nargs="+", help=f"policies, default {' '.join(SETTINGS)}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    for flag, default in (("--prompt-len", 512), ("--num-tokens", 1300)):
        parser.add_argument(flag, type=int, default=default, help="tokens, default %(default)s")
    parser.add_argument("--race-requests", type=int, default=64, help="default %(default)s")
    parser.add_argument("--race-tokens", type=int, default=400, help="of each of them, default %(default)s")
    parser.add_argument("--flags", default="", help="further flags of all servers, in one string")
    parser.add_argument("--work", type=Path, default=Path(".cache/serve_check"), help="made-up models")
    options = parser.parse_args()
    if options.smoke:
        refuse_to_overwrite(parser, options)
        vars(options).update(SMOKE, work=options.out / "work")
    exit_on_first_signal()
    try:
        options.policies = [
            parse_setting(text) for text in options.settings or (SMOKE_SETTINGS if options.smoke else SETTINGS)
        ]
    except ValueError as error:
        parser.error(str(error))
    if any(setting.config is None for setting in options.policies):
        parser.error("--settings none leaves nothing to compare: name policies; one server without any runs anyway")
    folder = options.out or hardware_folder()
    results = Results(folder, run_info(**{k: str(v) for k, v in vars(options).items() if k != "policies"}))
    try:
        for part in options.parts:
            PARTS[part](options, results)
    except ServerError as error:
        print(f"serve_check: {error}", file=sys.stderr)
        return 1
    if results.rows:
        print(f"\n{markdown(results.rows)}\n\n{plot(folder)}")
    for problem in results.problems:
        print(f"serve_check: {problem}", file=sys.stderr)
    return int(bool(results.problems))


if __name__ == "__main__":
    sys.exit(main())
