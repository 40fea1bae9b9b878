"""Does a server stay as it is, for as long as it is used?

    python -m benchmarks.soak [--minutes 30] [--clients 12] [--cases 28] [--interval 5] [--cycle 60] [--seed 0]
        [--policy rkv] [--budget 64] [--buffer 32] [--pool 16384] [--server-args "..."] [--out FOLDER] [--smoke]

One server with a tiny model of random weights gets a mixed load for that long: whole answers, streams, aborts and
clients that leave in the middle, of questions with different lengths, shared beginnings and settings of their own. Each
question was asked alone before, so every answer is known, and also what comes of one that is cut off.

Every ``--interval`` seconds the memory of every process (PSS without files), the pool, the metrics and the latencies
since the last look are noted. Every ``--cycle`` seconds the load stops; when the server is idle and its prefix cache
emptied, no slot of the pool may be in use. Growth of memory is the slope of a line through these idle moments, the
first fifth of them left out, with a 95 % bootstrap interval.

Writes ``soak.csv`` (one row a look; columns in ``common/tables.py``), ``soak.json`` and ``soak.png``, and prints what
was found. Ends with status 1 if an answer was wrong, a request failed or a slot was lost.
"""

import argparse
import random
import shlex
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.common.arguments import benchmark_parser
from benchmarks.common.schema import Row, hardware_folder, run_info, write_table
from benchmarks.common.settings import policy_setting
from benchmarks.common.tables import SOAK
from benchmarks.soak.load import WAYS, Load, ask_alone, make_cases
from benchmarks.soak.report import IDLE, LOAD, leaked_tokens, plot, summary
from benchmarks.soak.watch import memory_mib, metrics
from devtools.launch import Server, ServerError, exit_on_first_signal, launched_server
from devtools.tiny_models import BENCHMARK_MODEL, tiny_model_path

SMOKE = {"minutes": 0.3, "clients": 6, "cases": 7, "interval": 2.0, "cycle": 6.0}
IDLE_TIMEOUT_S = 60
# SGLang's own check of the pool at every step; it ends the server at the first slot that is not accounted for.
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "OMP_NUM_THREADS": "1"}


def look(server: Server, load: Load, phase: str, start: float) -> Row:
    """Return one row of what is to be seen now."""
    latencies, tokens = load.take()
    p50, p99 = (1000 * np.quantile(latencies, [0.5, 0.99])).tolist() if latencies else (float("nan"),) * 2
    seen = metrics(server)
    return {
        "seconds": round(time.monotonic() - start, 2),
        "phase": phase,
        **{f"pss_{role}_mib": round(value, 2) for role, value in memory_mib(server).items()},
        **{name: int(value) for name, value in seen.items()},
        "latency_p50_ms": round(p50, 1),
        "latency_p99_ms": round(p99, 1),
        "tokens": tokens,
        "requests": sum(load.counts[way] for way in WAYS),
        "mismatches": load.counts["mismatches"],
        "errors": load.counts["errors"],
    }


def idle_look(server: Server, load: Load, start: float) -> Row:
    """Wait until nothing is in use, or for a while, and return the row of that moment."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    server.flush_cache()
    while (row := look(server, load, IDLE, start))["pool_tokens"] and time.monotonic() < deadline:
        time.sleep(0.5)
    return row


def soak(server: Server, load: Load, options: argparse.Namespace) -> list[Row]:
    """Run the load and return all looks."""
    start = time.monotonic()
    end = start + 60 * options.minutes
    rows: list[Row] = []
    refresh_s = 1 if sys.stderr.isatty() else 60
    with tqdm(total=round(60 * options.minutes), unit="s", desc="soak", mininterval=refresh_s) as progress:
        while (now := time.monotonic()) < end:
            part_end = min(end, now + options.cycle)
            with load.running(options.clients, len(rows)):
                while (left := part_end - time.monotonic()) > 0:
                    time.sleep(min(left, options.interval))
                    rows.append(look(server, load, LOAD, start))
                    progress.update(round(time.monotonic() - start) - progress.n)
            rows.append(idle_look(server, load, start))
    return rows


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = benchmark_parser(__doc__, smoke="20 seconds; into .cache/soak unless told otherwise")
    for flag, default, what in (
        ("--minutes", 30.0, "of load"),
        ("--interval", 5.0, "seconds between two looks"),
        ("--cycle", 60.0, "seconds between two idle moments"),
        ("--clients", 12, "requests at a time"),
        ("--cases", 28, "different questions"),
        ("--seed", 0, "of questions and clients"),
        ("--budget", 64, "--kv-budget"),
        ("--buffer", 32, "--kv-buffer"),
        ("--pool", 16384, "tokens of the KV pool"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=f"{what}, default %(default)s")
    parser.add_argument("--policy", default="rkv", help="--kv-policy, default %(default)s")
    parser.add_argument("--server-args", default="", help="further flags of the server, in one string")
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE, out=options.out or Path(".cache/soak"))
    return options


def main() -> int:
    """Run the benchmark from the command line."""
    options = parse_arguments()
    exit_on_first_signal()
    setting = policy_setting(options.policy, options.budget, options.buffer)
    flags = ("--max-total-tokens", str(options.pool), "--enable-metrics", "--kv-trace", "--sleep-on-idle")
    flags = (*flags, *setting.flags, *shlex.split(options.server_args))
    cases = make_cases(random.Random(options.seed), options.cases, options.budget, options.buffer)
    log_path = Path(".cache/logs/soak.log")
    try:
        with launched_server(
            str(tiny_model_path(BENCHMARK_MODEL)), *flags, log_path=log_path, environment=STRICT
        ) as server:
            load = Load(server, cases, ask_alone(server, cases), options.seed)
            rows = soak(server, load, options)
    except (ServerError, OSError) as error:
        print(f"soak: {error}; the server's log: {log_path}", file=sys.stderr)
        return 1
    out = options.out or hardware_folder()
    named = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    info = run_info(**named, model="llama-gqa (tiny, random)")
    write_table(out, SOAK, rows, {**info, "asked": dict(load.counts), "found": summary(rows).splitlines()})
    print("\n".join([*load.problems, summary(rows), str(plot(out))]))
    return 1 if load.problems or leaked_tokens(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
