"""On a real server: are all decode steps replayed CUDA graphs, are tokens the same under all schedules, and step times.

    python -m benchmarks.gpu.serve_check [--out FOLDER] [--batches 1 64] [--prompt-len 512] [--num-tokens 1300]
        [--setting rkv:1024:128] [--model PATH] [--flags "--attention-backend flashinfer"] [--smoke]

Without ``--model`` it serves the shape of Llama-3.1-8B with made-up weights (``weights/``). Servers run one after the
other with the same flags. Three have the policy (``--setting rkv:1024:128:granularity=request``: in blocks that leave
the map alone): as it is, with SGLang's coarse write-after-read barrier, and without overlap scheduling; each gets the
same requests at once, with many compactions of small budgets, and all must give the same tokens: where they differ,
compaction and a forward pass raced for the index map. One without a policy must give others. The first and that one
then get every batch size. Step times are SGLang's own, from its decode log.

Ends with status 1 if tokens differ, if a step was not a replayed graph (on a GPU), or if an answer is not as long or
not as often compacted as it must be. Writes ``races.csv`` and ``serve_check.csv`` after every row, their ``.json``,
``serve_check.png``, and the servers' logs.
"""

import argparse
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import benchmark_parser
from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, Table, hardware_folder, read_table, run_info, write_table
from benchmarks.common.settings import Setting, no_policy, parse_setting
from benchmarks.common.statistics import compactions_before
from benchmarks.common.tables import RACES, SERVE_CHECK
from benchmarks.gpu.decode_log import figures_of, read_steps
from benchmarks.gpu.llama_shape import VOCAB_SIZE, served_model
from devtools.launch import Server, ServerError, exit_on_sigterm, has_gpu, launched_server
from rkv_sglang.config import NO_POLICY, REQUEST
from rkv_sglang.sizes.compaction_plan import LEAST_BLOCK
from rkv_sglang.sizes.pages import ceil_to_page

# How servers with the policy are started: further flags, and variables of their environment.
SCHEDULES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "": ((), {}),
    ", coarse barrier": ((), {"SGLANG_FORCE_COARSE_WAR_BARRIER": "1"}),
    ", no overlap": (("--disable-overlap-schedule",), {}),
}
# Tiny model and sizes, with or without a GPU.
SMOKE: dict[str, Any] = {
    "batches": [1, 4],
    "prompt_len": 16,
    "num_tokens": 150,
    "race_requests": 6,
    "race_tokens": 120,
}
SETTING, SMOKE_SETTING = "rkv:1024:128", "rkv:32:16"
# Of the racing requests; with blocks, buffers are whole ones.
RACE_BUDGETS, RACE_BUFFERS = (24, 120), (9, 48)
# The first batch builds what is built lazily, and fills no graph that a later one needs.
WARM_UP_TOKENS = 16
GPU_FLAGS = (
    *("--dtype", "bfloat16", "--attention-backend", "triton", "--mem-fraction-static", "0.8"),
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


def race(
    server: Server,
    setting: Setting,
    results: Results,
    expected: list[list[int]] | None,
    num_runs: int,
    options: argparse.Namespace,
) -> list[list[int]]:
    """Run the racing requests and return their tokens; ``expected`` are those of the first server, if it has run."""
    rng = random.Random(0)
    prompts = [
        [rng.randrange(3, options.vocab_size) for _ in range(rng.randint(1, options.prompt_len))]
        for _ in range(options.race_requests)
    ]
    asked = [race_sizes(rng, options.policy) for _ in prompts]
    for run in range(num_runs):
        server.flush_cache()
        answers = server.generate(prompts, options.race_tokens, custom_params=asked)
        found = [answer["output_ids"] for answer in answers]
        expected = found if expected is None else expected
        unequal = [
            next(i for i, (one, other) in enumerate(zip(mine, its, strict=True)) if one != other)
            for mine, its in zip(found, expected, strict=True)
            if mine != its
        ]
        compactions = [int(answer["meta_info"].get("kv_compactions", 0)) for answer in answers]
        due = [compactions_before(options.race_tokens - 1, own["kv_budget"], own["kv_buffer"]) for own in asked]
        row: Row = {
            "setting": setting.name,
            "run": run,
            "requests": len(prompts),
            "num_tokens": options.race_tokens,
            "compactions": sum(compactions),
            "equal_answers": len(prompts) - len(unequal),
            "first_difference": min(unequal, default=-1),
        }
        wrong = (
            [f"{setting.name}, run {run}: {len(unequal)} answers differ, first at {min(unequal)}"] if unequal else []
        )
        if setting.config is None:
            due = [0] * len(prompts)
            where = f"{setting.name}, run {run}"
        wrong = [f"{where}: {len(unequal)} answers differ, first at {min(unequal)}"] if unequal else []
        if setting.config is None:
            due = [0] * len(prompts)
            wrong = [] if unequal else ["without compaction all answers are the same: equal answers show nothing"]
        if compactions != due:
            wrong.append(f"{where}: {sum(compactions)} compactions instead of {sum(due)}")
        results.add(RACES, row, wrong)
    assert expected is not None
    return expected


def race_sizes(rng: random.Random, policy: Setting) -> dict[str, int]:
    """Draw the budget and buffer of a racing request."""
    config = policy.config
    assert config is not None
    block = LEAST_BLOCK if config.granularity == REQUEST else 1
    least, most = RACE_BUDGETS
    # The window and one more to choose from, at the least.
    least = max(least, config.window + block)
    budget, buffer = rng.randint(least, max(least, most)), rng.randint(*RACE_BUFFERS)
    return {"kv_budget": budget, "kv_buffer": ceil_to_page(buffer, block)}


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
    row = {"setting": setting.name, "batch_size": batch_size, **_sizes(options), "seconds": round(seconds, 3)}
    row |= figures_of(steps, batch_size)
    row["tokens_per_s"] = round(batch_size * options.num_tokens / seconds, 1)
    row["compactions"] = sum(int(answer["meta_info"].get("kv_compactions", 0)) for answer in answers)
    return row, wrong_with(row, answers, options)


def _sizes(options: argparse.Namespace) -> Row:
    sizes = {name: getattr(options, name) for name in ("prompt_len", "num_tokens")}
    return {**sizes, "budget": options.policy.budget, "buffer": options.policy.buffer}


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


def run_all(options: argparse.Namespace, results: Results) -> None:
    """Run all servers, one after the other."""
    model, made_up, environment = served_model(options.model, options.work, tiny=options.smoke)
    flags = [*(GPU_FLAGS if has_gpu() else ()), "--decode-log-interval", "1", *made_up, *shlex.split(options.flags)]
    policy = options.policy
    settings = [
        replace(policy, name=policy.name + name, own_flags=own, environment=variables)
        for name, (own, variables) in SCHEDULES.items()
    ]
    settings.append(no_policy())
    expected: list[list[int]] | None = None
    for number, setting in enumerate(settings):
        print(f"{setting.name}: starting a server ...", flush=True)
        start = time.perf_counter()
        log_path = results.folder / f"server_{number}.log"
        with launched_server(
            model, *flags, *setting.flags, log_path=log_path, environment={**environment, **setting.environment}
        ) as server:
            print(f"{setting.name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
            # The first server twice: what differs there is no matter of the schedule. The one without a policy must
            # differ: a model that says the same whatever is in the cache would hide any race.
            expected = race(server, setting, results, expected, 2 if expected is None else 1, options)
            for batch_size in options.batches if setting in (settings[0], settings[-1]) else ():
                results.add(SERVE_CHECK, *measure(server, setting, batch_size, options))


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows, the policy beside none, as a Markdown table."""
    lines = [
        "| batch | setting | tokens/s | step p50 ms | p99 | compacting p50 | p99 | graph steps |",
        "|---" * 8 + "|",
    ]
    for row in sorted(rows, key=lambda row: (int(row["batch_size"]), str(row["setting"]))):
        shown = [row["tokens_per_s"], row["step_p50_ms"], row["step_p99_ms"]]
        shown += [row["compacting_p50_ms"], row["compacting_p99_ms"], f"{row['graph_steps']}/{row['steps']}"]
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


def main() -> int:
    """Run the check from the command line."""
    parser = benchmark_parser(__doc__, smoke="a tiny model and short answers; needs --out")
    parser.add_argument("--model", help="folder or hub name; default: the shape of Llama-3.1-8B, dummy weights")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="prompts are random ids below it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="requests at once")
    parser.add_argument("--setting", help=f"the policy, default {SETTING}")
    for flag, default in (("--prompt-len", 512), ("--num-tokens", 1300)):
        parser.add_argument(flag, type=int, default=default, help="tokens, default %(default)s")
    parser.add_argument("--race-requests", type=int, default=64, help="default %(default)s")
    parser.add_argument("--race-tokens", type=int, default=400, help="of each of them, default %(default)s")
    parser.add_argument("--flags", default="", help="further flags of both servers, in one string")
    parser.add_argument("--work", type=Path, default=Path(".cache/serve_check"), help="made-up models")
    options = parser.parse_args()
    if options.smoke:
        if options.out is None:
            parser.error("--smoke must not overwrite results: name another folder with --out")
        vars(options).update(SMOKE, work=options.out / "work")
    exit_on_sigterm()
    try:
        options.policy = parse_setting(options.setting or (SMOKE_SETTING if options.smoke else SETTING))
    except ValueError as error:
        parser.error(str(error))
    if options.policy.config is None:
        parser.error("--setting none leaves nothing to compare: name a policy")
    folder = options.out or hardware_folder()
    results = Results(folder, run_info(**{k: str(v) for k, v in vars(options).items() if k != "policy"}))
    try:
        run_all(options, results)
    except ServerError as error:
        print(f"serve_check: {error}", file=sys.stderr)
        return 1
    print(f"\n{markdown(results.rows)}\n\n{plot(folder)}")
    for problem in results.problems:
        print(f"serve_check: {problem}", file=sys.stderr)
    return int(bool(results.problems))


if __name__ == "__main__":
    sys.exit(main())
