"""Throughput on a real server where memory is the limit: policies against SGLang as it is.

    python -m benchmarks.gpu.throughput [--out FOLDER] [--rounds 3] [--num-requests 20] [--prompt-len 64]
        [--num-tokens 2048] [--pool-requests 4] [--settings rkv:256:64 rkv:256:64:stagger ...] [--model PATH]
        [--flags "..."] [--smoke]

The pool holds as many whole requests as ``--pool-requests`` says. All servers start side by side, then take turns: in
every round each gets the same requests, all at once, so that without ``stagger`` they are compacted in lockstep.
Without ``--model`` it serves the shape of Llama-3.1-8B with made-up weights. Times between tokens are those between
SGLang's own decode log lines, prefills included. Writes ``throughput.csv`` after every row, ``throughput.json`` and
``throughput.png``, and the servers' logs; ends with status 1 if an answer is not as long or not as often compacted as
it must be.
"""

import argparse
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.arguments import benchmark_parser, refuse_to_overwrite
from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, hardware_folder, read_table, run_info, write_table
from benchmarks.common.settings import Setting, as_file_name, no_policy, parse_setting
from benchmarks.common.statistics import compactions_before
from benchmarks.common.tables import THROUGHPUT
from benchmarks.gpu.decode_log import read_steps
from benchmarks.gpu.llama_shape import VOCAB_SIZE, served_model
from benchmarks.gpu.side_by_side import groups_that_fit, servers_side_by_side
from devtools.launch import Server, ServerError, exit_on_first_signal, has_gpu
from rkv_sglang.config import NO_POLICY
from rkv_sglang.sizes.stagger import head_start

SMOKE: dict[str, Any] = {
    "rounds": 1,
    "num_requests": 8,
    "prompt_len": 16,
    "num_tokens": 192,
    "pool_requests": 2,
    "settings": ["rkv:32:16", "rkv:32:16:stagger", "rkv:32:16:granularity=request"],
}
GPU_FLAGS = ("--dtype", "bfloat16", "--attention-backend", "triton", "--context-length", "16384")
SETTINGS = ["rkv:256:64", "rkv:256:64:stagger", "rkv:256:64:granularity=request"]
# What one server takes with so small a pool.
SERVER_GIB = 24.0
_RETRACTED = re.compile(r"#retracted_reqs: (\d+)")


def run_round(server: Server, setting: Setting, number: int, options: argparse.Namespace) -> tuple[Row, list[str]]:
    """Return the row of one server in one round, and what is wrong with it."""
    rng = random.Random(number)
    prompts = [
        [rng.randrange(3, options.vocab_size) for _ in range(options.prompt_len)] for _ in range(options.num_requests)
    ]
    server.flush_cache()
    offset = server.log_path.stat().st_size
    start = time.perf_counter()
    answers = server.generate(prompts, options.num_tokens)
    seconds = time.perf_counter() - start
    # The last lines may be a moment behind the answer.
    time.sleep(1)
    log = server.log_since(offset)
    steps = read_steps(log)
    times = [step.time_ms for step in steps] or [float("nan")]
    compactions = sum(int(answer["meta_info"].get("kv_compactions", 0)) for answer in answers)
    retractions = sum(int(count) for count in _RETRACTED.findall(log))
    row: Row = {
        "setting": setting.name,
        "round": number,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(options.num_requests * options.num_tokens / seconds, 1),
        "running_p50": int(np.percentile([step.running for step in steps] or [0], 50)),
        "running_max": max((step.running for step in steps), default=0),
        "retractions": retractions,
        "step_p50_ms": round(float(np.percentile(times, 50)), 4),
        "step_p99_ms": round(float(np.percentile(times, 99)), 4),
        "compactions": compactions,
        "pool": options.pool,
        **{name: getattr(options, name) for name in ("num_requests", "prompt_len", "num_tokens")},
        "budget": setting.budget,
        "buffer": setting.buffer,
    }
    expected = sum(
        _due(setting, prompt, answer["output_ids"], options.num_tokens)
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    # A request that is preempted and computed again is compacted at other steps.
    wrong = compactions != expected and retractions == 0
    return row, [f"{setting.name}: {compactions} compactions instead of {expected}"] if wrong else []


def _due(setting: Setting, prompt: Sequence[int], output_ids: Sequence[int], num_tokens: int) -> int:
    """Return how many compactions one request must have had."""
    if setting.config is None:
        return 0
    early = (head_start(setting.config, prompt, output_ids) or 0) if setting.config.stagger else 0
    return compactions_before(num_tokens - 1 + early, setting.budget, setting.buffer)


def run_all(folder: Path, options: argparse.Namespace) -> list[str]:
    """Run all rounds and return what is wrong."""
    model, made_up, environment = served_model(options.model, options.work, tiny=options.smoke)
    flags = [*(GPU_FLAGS if has_gpu() else ()), "--max-total-tokens", str(options.pool), "--decode-log-interval", "1"]
    flags += [*made_up, *shlex.split(options.flags)]
    logs = {setting: folder / f"throughput_{as_file_name(setting.name)}.log" for setting in options.servers}
    rows: list[Row] = []
    problems: list[str] = []
    info = run_info(**{name: str(value) for name, value in vars(options).items() if name != "servers"})
    print(f"starting {len(logs)} servers ...", flush=True)
    with servers_side_by_side(model, flags, logs, environment) as servers:
        print("ready", flush=True)
        for number in range(options.rounds):
            for setting, server in servers.items():
                row, wrong = run_round(server, setting, number, options)
                rows.append(row)
                problems += wrong
                print("\n".join([str(row), *wrong]), flush=True)
                write_table(folder, THROUGHPUT, rows, {**info, "problems": problems})
    return problems


def summary(rows: Sequence[Row]) -> str:
    """Return a line for each policy, with the ratio of the throughputs round by round."""
    speeds = {(str(row["setting"]), row["round"]): float(row["tokens_per_s"]) for row in rows}
    ratios: dict[str, list[str]] = {}
    for (name, number), speed in speeds.items():
        if name != NO_POLICY and (NO_POLICY, number) in speeds:
            ratios.setdefault(name, []).append(f"{speed / speeds[NO_POLICY, number]:.2f}")
    return "\n".join(f"{name} over none, round by round: {', '.join(found)}" for name, found in ratios.items())


def plot(folder: Path) -> Path:
    """Draw ``throughput.png`` from the CSV in ``folder``: one bar a server, one dot a round."""
    pyplot = load_pyplot()
    rows = read_table(folder, THROUGHPUT)
    columns = ("tokens_per_s", "running_p50", "step_p50_ms", "step_p99_ms")
    figure, places = pyplot.subplots(1, len(columns), figsize=(10, 2.8), layout="constrained")
    names = list(dict.fromkeys(str(row["setting"]) for row in rows))
    for axes, column in zip(places, columns, strict=True):
        for place, name in enumerate(names):
            values = [float(row[column]) for row in rows if row["setting"] == name]
            axes.bar(place, statistics.mean(values), alpha=0.5)
            axes.plot([place] * len(values), values, "k.")
        axes.set_xticks(range(len(names)), names, rotation=15, ha="right", fontsize=6)
        axes.set_title(column)
    path = folder / "throughput.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main() -> int:
    """Run from the command line."""
    parser = benchmark_parser(__doc__, smoke="a tiny model and short answers; needs --out")
    parser.add_argument("--model", help="folder or hub name; default: the shape of Llama-3.1-8B, made-up weights")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="prompts are random ids below it")
    for flag, default in (
        *(("--rounds", 3), ("--num-requests", 20), ("--prompt-len", 64), ("--num-tokens", 2048)),
        ("--pool-requests", 4),
    ):
        parser.add_argument(flag, type=int, default=default, help="default %(default)s")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="policies, default %(default)s")
    parser.add_argument("--flags", default="", help="further flags of all servers, in one string")
    parser.add_argument("--work", type=Path, default=Path(".cache/serve_check"), help="made-up models")
    options = parser.parse_args()
    if options.smoke:
        refuse_to_overwrite(parser, options)
        vars(options).update(SMOKE, work=options.out / "work")
    # Beside whole requests a little, since SGLang wants something to be left.
    options.pool = options.pool_requests * (options.prompt_len + options.num_tokens) + 64
    try:
        options.servers = [*map(parse_setting, options.settings), no_policy()]
    except ValueError as error:
        parser.error(str(error))
    if has_gpu() and len(fitting := groups_that_fit(options.servers, SERVER_GIB)[0]) < len(options.servers):
        parser.error(
            f"{len(options.servers)} servers of {SERVER_GIB:.0f} GiB do not fit on this GPU side by side: name "
            f"{len(fitting) - 1} --settings"
        )
    exit_on_first_signal()
    folder = options.out or hardware_folder()
    try:
        problems = run_all(folder, options)
    except ServerError as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 1
    print(f"\n{summary(read_table(folder, THROUGHPUT))}\n{plot(folder)}")
    for problem in problems:
        print(f"throughput: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
