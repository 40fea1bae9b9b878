"""Many long requests in a pool that holds the full cache of one or two: requests at once, retractions, throughput.

    python -m benchmarks.memory [--settings rkv:128:64,none] [--rounds 3] [--num-requests 64] [--prompt-len 64]
        [--num-tokens 2048] [--pool 4096] [--no-strict] [--out FOLDER] [--smoke]

The servers (with a policy: R-KV, R-KV by blocks that leave the map alone, a draw of blocks; and SGLang without one)
have the same pool and get the same requests, all at once, one server after the other in every round. SGLang's strict
memory checks are on unless told otherwise. Writes ``memory.csv`` (one row per round and server; columns in
``common/tables.py``), ``memory.json`` and ``memory.png`` and prints the ratio of the throughputs with its spread.
"""

import argparse
import contextlib
import random
import re
import statistics
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.common.arguments import benchmark_parser
from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, hardware_folder, read_table, run_info, write_table
from benchmarks.common.settings import as_file_name, parse_setting
from benchmarks.common.tables import MEMORY
from devtools.launch import Server, ServerError, exit_on_first_signal, launched_server
from devtools.tiny_models import BENCHMARK_MODEL, VOCAB_SIZE, tiny_model_path
from rkv_sglang.config import NO_POLICY

STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "2", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
SMOKE = {"rounds": 1, "num_requests": 8, "prompt_len": 16, "num_tokens": 192, "pool": 512}
SMOKE_SETTINGS = "rkv:32:16,rkv:32:16:granularity=request,none"
SETTINGS = "rkv:128:64,rkv:128:64:granularity=request,random_attention:128:64,none"
_RUNNING = re.compile(r"Decode batch, #running-req: (\d+)")
_RETRACTED = re.compile(r"#retracted_reqs: (\d+)")


def run_requests(server: Server, prompts: list[list[int]], num_tokens: int, progress: str) -> float:
    """Send all prompts in one call and return the seconds until the last is done."""
    done = threading.Event()
    watcher = threading.Thread(target=_show_progress, args=(done, progress), daemon=True)
    watcher.start()
    start = time.perf_counter()
    try:
        server.generate(prompts, num_tokens, timeout_s=3600)
    finally:
        done.set()
        watcher.join()
    return time.perf_counter() - start


def _show_progress(done: threading.Event, label: str) -> None:
    with tqdm(desc=label, unit="s", bar_format="{desc}: {elapsed}") as bar:
        while not done.wait(5):
            bar.update(5)


def measure(options: argparse.Namespace, log_dir: Path) -> list[Row]:
    """Return one row per round and server."""
    model = str(tiny_model_path(BENCHMARK_MODEL))
    pool = ("--max-total-tokens", str(options.pool), "--decode-log-interval", "1", "--sleep-on-idle")
    environment = {"OMP_NUM_THREADS": "1", **({} if options.no_strict else STRICT)}
    rng = random.Random(0)
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        servers = {
            setting: stack.enter_context(
                launched_server(
                    model,
                    *(*pool, *setting.flags),
                    log_path=log_dir / f"memory_{as_file_name(setting.name)}.log",
                    environment=environment,
                )
            )
            for setting in options.settings
        }
        for i in range(options.rounds):
            prompts = [
                [rng.randrange(3, VOCAB_SIZE) for _ in range(options.prompt_len)] for _ in range(options.num_requests)
            ]
            for setting, server in servers.items():
                offset = server.log_path.stat().st_size
                seconds = run_requests(server, prompts, options.num_tokens, f"round {i + 1}, {setting.name}")
                text = server.log_since(offset)
                rows.append(
                    {
                        "round": i,
                        "setting": setting.name,
                        "seconds": round(seconds, 2),
                        "tokens_per_s": round(options.num_requests * options.num_tokens / seconds, 1),
                        "peak_running": max((int(count) for count in _RUNNING.findall(text)), default=0),
                        "retractions": sum(int(count) for count in _RETRACTED.findall(text)),
                        "pool": options.pool,
                        "num_requests": options.num_requests,
                        "prompt_len": options.prompt_len,
                        "num_tokens": options.num_tokens,
                        "budget": setting.budget,
                        "buffer": setting.buffer,
                    }
                )
                print(rows[-1])
    return rows


def plot(folder: Path) -> Path:
    """Draw ``memory.png`` from ``memory.csv``: throughput and requests at once, one bar a server, one dot a round."""
    pyplot = load_pyplot()
    rows = read_table(folder, MEMORY)
    names = list(dict.fromkeys(str(row["setting"]) for row in rows))
    figure, both = pyplot.subplots(1, 2, figsize=(9, 1.4 + 0.4 * len(names)), sharey=True, layout="constrained")
    for axes, column, title in zip(both, ("tokens_per_s", "peak_running"), ("tokens/s", "peak running"), strict=True):
        for place, name in enumerate(names):
            values = [float(row[column]) for row in rows if row["setting"] == name]
            axes.barh(place, statistics.mean(values), alpha=0.5)
            axes.plot(values, [place] * len(values), "k.")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title)
    path = folder / "memory.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def main() -> int:
    """Run the benchmark from the command line."""
    parser = benchmark_parser(__doc__, smoke="one short round; into .cache/memory unless told otherwise")
    for flag, default in (
        ("--rounds", 3),
        ("--num-requests", 64),
        ("--prompt-len", 64),
        ("--num-tokens", 2048),
        ("--pool", 4096),
    ):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--settings", default=SETTINGS, help="comma-separated, default %(default)s")
    parser.add_argument("--no-strict", action="store_true", help="leave SGLang's strict memory checks off")
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE, settings=SMOKE_SETTINGS, out=options.out or Path(".cache/memory"))
    try:
        options.settings = [parse_setting(text) for text in options.settings.split(",")]
    except ValueError as error:
        parser.error(str(error))
    exit_on_first_signal()
    out = options.out or hardware_folder()
    try:
        rows = measure(options, Path(".cache/logs"))
    except ServerError as error:
        print(f"memory: {error}", file=sys.stderr)
        return 1
    info = run_info(model="llama-gqa (tiny, random)", strict_memory_checks=not options.no_strict)
    write_table(out, MEMORY, rows, info)
    plot(out)
    speed = {(row["round"], row["setting"]): float(row["tokens_per_s"]) for row in rows}
    for name in [setting.name for setting in options.settings if setting.config]:
        if (0, NO_POLICY) in speed:
            ratios = [speed[i, name] / speed[i, NO_POLICY] for i in range(options.rounds)]
            spread = f"median of {len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f}"
            print(f"throughput {name} / {NO_POLICY}: {statistics.median(ratios):.2f} ({spread})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
