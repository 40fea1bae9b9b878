"""The cost of one step's compactions, entries moved per head against blocks dropped from the map, on a CPU.

    python -m benchmarks.drop_cost [--rounds 7] [--due 64] [--budget 1024] [--buffer 128] [--out FOLDER] [--smoke]

The pool has the shape of the tiny model of the tests (3 layers, 2 KV heads, head_dim 32, fp32), so moving is as cheap
as it can be; slots are scattered over it. Timed is what the server does with requests that are due at once, from their
rows of the map to the pages that come free: for ``gather`` reading the rows, scoring, choosing and moving; for ``drop``
choosing and rewriting the rows. CPU time of one thread, the ways in turn within each round, one warm-up before. Writes
``drop_cost.csv`` (one row per round and way; columns in ``common/tables.py``), ``drop_cost.json`` and
``drop_cost.png``, and prints the ratios with their spread.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common.arguments import benchmark_parser
from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, hardware_folder, read_table, run_info, write_table
from benchmarks.common.tables import DROP_COST
from rkv_sglang.cache.block_choice import choose_by_place
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest, compact_requests
from rkv_sglang.cache.drop import drop_blocks
from rkv_sglang.cache.step_tensors import read_slots
from rkv_sglang.policies import RKV, Policy, RandomAttention
from rkv_sglang.sizes.compaction_plan import plan_compaction, plan_drop

NUM_LAYERS, NUM_KV_HEADS, NUM_QO_HEADS, HEAD_DIM, PROMPT_LEN, WINDOW, BLOCK = 3, 2, 4, 32, 71, 64, 16
SMOKE = {"rounds": 2, "due": 4, "budget": 128, "buffer": 32}
# Each over the last one.
WAYS = ("gather rkv", "gather random_attention", "drop random_attention")


def make_ways(due: int, budget: int, buffer: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; each leaves map and pool fit for the next round."""
    resident_len = PROMPT_LEN + budget + buffer
    num_slots = due * resident_len + 1
    req_to_token = (torch.randperm(num_slots - 1) + 1).to(torch.int32).view(due, resident_len)
    ones = [1.0] * NUM_LAYERS
    layers = [[torch.randn(num_slots, NUM_KV_HEADS, HEAD_DIM) for _ in ones] for _ in range(2)]
    buffers = KVBuffers.from_layers(*layers, dtype=torch.float32, key_scales=ones, value_scales=ones)
    queries = torch.randn(NUM_LAYERS, due, WINDOW, NUM_QO_HEADS, HEAD_DIM)
    rows, lens = list(range(due)), {"prompt_len": PROMPT_LEN, "resident_len": resident_len, "budget": budget}
    gathered = plan_compaction(**lens, page_size=1)
    dropped = plan_drop(**lens, window=WINDOW, block=BLOCK)

    def gather(policy: Policy) -> object:
        slots = read_slots(req_to_token, rows, [resident_len] * due)
        requests = [DueRequest(gathered, own, resident_len) for own in slots]
        return compact_requests(buffers, requests, lambda part, of: queries[of][:, part], policy, WINDOW)

    def drop() -> object:
        choices = choose_by_place([(dropped, resident_len, None)] * due, RandomAttention(), WINDOW)
        return drop_blocks(req_to_token, rows, [dropped] * due, choices, 1)

    return dict(zip(WAYS, (lambda: gather(RKV()), lambda: gather(RandomAttention()), drop), strict=True))


def measure(rounds: int, due: int, budget: int, buffer: int) -> list[Row]:
    """Return one row per round and way."""
    ways = make_ways(due, budget, buffer)
    rows: list[Row] = []
    for number in range(-1, rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            milliseconds = (time.process_time() - start) * 1e3
            sizes = {"due": due, "budget": budget, "buffer": buffer}
            rows += [{"round": number, "way": name, "cpu_ms": round(milliseconds, 3), **sizes}] * (number >= 0)
    return rows


def ratios(rows: list[Row], way: str) -> list[float]:
    """Return how many times as long a way took as dropping did, round by round."""
    times = {(row["round"], row["way"]): float(row["cpu_ms"]) for row in rows}
    return [value / times[number, WAYS[-1]] for (number, name), value in times.items() if name == way]


def plot(folder: Path) -> Path:
    """Draw ``drop_cost.png`` from ``drop_cost.csv``: a bar a way, a dot a round."""
    pyplot = load_pyplot()
    rows = read_table(folder, DROP_COST)
    figure, axes = pyplot.subplots(figsize=(5, 2.8), layout="constrained")
    for place, name in enumerate(WAYS):
        values = [float(row["cpu_ms"]) for row in rows if row["way"] == name]
        axes.bar(place, statistics.median(values), alpha=0.5)
        axes.plot([place] * len(values), values, "k.")
    axes.set_xticks(range(len(WAYS)), [name.replace(" ", "\n") for name in WAYS])
    axes.set_yscale("log")
    axes.set_ylabel("CPU time (ms)")
    path = folder / "drop_cost.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def main() -> int:
    """Run the benchmark from the command line."""
    parser = benchmark_parser(__doc__, smoke="few small requests; into .cache/drop_cost unless told otherwise")
    for flag, default in (("--rounds", 7), ("--due", 64), ("--budget", 1024), ("--buffer", 128)):
        parser.add_argument(flag, type=int, default=default)
    options: argparse.Namespace = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE, out=options.out or Path(".cache/drop_cost"))
    torch.set_num_threads(1)
    rows = measure(options.rounds, options.due, options.budget, options.buffer)
    out = options.out or hardware_folder()
    write_table(out, DROP_COST, rows, run_info(window=WINDOW, block=BLOCK, prompt_len=PROMPT_LEN))
    plot(out)
    for name in WAYS[:-1]:
        own = ratios(rows, name)
        spread = f"median of {len(own)}, {min(own):.0f} to {max(own):.0f}"
        print(f"{name} / {WAYS[-1]}: {statistics.median(own):.0f} ({spread})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
