"""What a policy costs while it has nothing to do: decode step time against no policy and against no package.

Three servers run side by side on one thread each, idle ones asleep. In each short round every server decodes the same
batch once, in an order that changes from round to round, so that noise of the machine hits all alike; ratios are taken
within a round, of wall-clock time and of the CPU time of the server's processes (which other programs disturb less).

    python -m benchmarks.idle_cost [--rounds 150] [--batch-size 8] [--num-tokens 64] [--starts 5]
        [--out FOLDER] [--smoke]

First servers without a policy start ``--starts`` times with and without the package, one after the other, and each says
one token: how long until then, and how much CPU time its processes took. Writes ``first_token.csv`` and
``idle_cost.csv`` (one row per start, or round and server; columns in ``common/tables.py``), their ``.json`` and
``idle_cost.png`` and prints the ratios with their spread.
"""

import contextlib
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.common.arguments import benchmark_parser
from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import Row, Value, hardware_folder, read_table, run_info, write_table
from benchmarks.common.settings import STOCK_ENVIRONMENT, Setting, policy_setting
from benchmarks.common.tables import FIRST_TOKEN, IDLE_COST
from devtools.launch import Server, ServerError, exit_on_first_signal, launched_server
from devtools.tiny_models import BENCHMARK_MODEL, VOCAB_SIZE, tiny_model_path
from rkv_sglang.config import PolicyConfig

SMOKE = {"rounds": 4, "batch_size": 2, "num_tokens": 16, "starts": 1}
BASELINE = "no package"
SETTINGS = (
    Setting(BASELINE, environment=STOCK_ENVIRONMENT),
    Setting("policy none"),
    # So large that no request of the batch reaches it.
    policy_setting("rkv", 4096, PolicyConfig.buffer, name="policy rkv, not due"),
)


@dataclass(frozen=True)
class StepTime:
    """Mean time of a decode step."""

    wall_ms: float
    cpu_ms: float


def cpu_seconds(server: Server) -> float:
    """Return the CPU time that all processes of a server have used up to now."""
    family = [server.process, *server.process.children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in family))


def decode_step_time(server: Server, prompts: list[list[int]], num_tokens: int) -> StepTime:
    """Decode one batch; the prefill of its short prompts and HTTP are counted in, alike for all servers."""
    start, cpu_start = time.perf_counter(), cpu_seconds(server)
    server.generate(prompts, num_tokens + 1)
    wall, cpu = time.perf_counter() - start, cpu_seconds(server) - cpu_start
    return StepTime(wall_ms=wall * 1000 / num_tokens, cpu_ms=cpu * 1000 / num_tokens)


def measure_starts(starts: int, log_dir: Path) -> list[Row]:
    """Return one row per start of a server without a policy, with and without the package."""
    model = str(tiny_model_path(BENCHMARK_MODEL))
    rng = random.Random(0)
    rows: list[Row] = []
    for i in tqdm(range(starts), desc="starts", unit="round"):
        for setting in rng.sample(SETTINGS[:2], 2):
            start = time.perf_counter()
            with launched_server(
                model,
                "--skip-server-warmup",
                log_path=log_dir / "first_token.log",
                environment={"OMP_NUM_THREADS": "1", **setting.environment},
            ) as server:
                ready = time.perf_counter()
                server.generate([[rng.randrange(3, VOCAB_SIZE) for _ in range(16)]], 1)
                first_token = time.perf_counter()
                rows.append(
                    {
                        "round": i,
                        "setting": setting.name,
                        "ready_s": round(ready - start, 3),
                        "first_token_s": round(first_token - ready, 4),
                        "cpu_s": round(cpu_seconds(server), 3),
                    }
                )
    return rows


def measure(rounds: int, batch_size: int, num_tokens: int, log_dir: Path) -> list[Row]:
    """Return one row per round and server."""
    model = str(tiny_model_path(BENCHMARK_MODEL))
    rng = random.Random(0)
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        servers = {
            setting.name: stack.enter_context(
                launched_server(
                    model,
                    *("--sleep-on-idle", "--disable-radix-cache", *setting.flags),
                    log_path=log_dir / f"idle_cost_{i}.log",
                    environment={"OMP_NUM_THREADS": "1", **setting.environment},
                )
            )
            for i, setting in enumerate(SETTINGS)
        }
        for i in tqdm(range(-1, rounds), desc="rounds", unit="round"):
            prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(16)] for _ in range(batch_size)]
            for name in rng.sample(list(servers), len(servers)):
                step = decode_step_time(servers[name], prompts, num_tokens)
                # The first round warms up.
                if i >= 0:
                    rows.append({"round": i, "setting": name, "batch_size": batch_size, **asdict(step)})
    return rows


def ratios(rows: list[Row], setting: str, measured: str) -> list[float]:
    """Return one column of the setting over the baseline's, round by round."""
    by_round: dict[Value, dict[Value, float]] = {}
    for row in rows:
        by_round.setdefault(row["round"], {})[row["setting"]] = float(row[measured])
    return [steps[setting] / steps[BASELINE] for steps in by_round.values()]


def summary(rows: list[Row], setting: str, measured: str) -> str:
    """Return the ratios' median with its bootstrap interval, quartiles and range in one line."""
    values = ratios(rows, setting, measured)
    low, _, high = statistics.quantiles(values, n=4)
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(1000))
    return (
        f"{setting} / {BASELINE}, {measured}: median {statistics.median(values):.3f}, "
        f"95 % interval of the median {medians[25]:.3f} to {medians[974]:.3f}, "
        f"quartiles {low:.3f} to {high:.3f}, range {min(values):.3f} to {max(values):.3f}, {len(values)} rounds"
    )


def plot(folder: Path) -> Path:
    """Draw every round's ratio in ``idle_cost.png``, from ``idle_cost.csv``."""
    pyplot = load_pyplot()
    rows = read_table(folder, IDLE_COST)
    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    names = [setting.name for setting in SETTINGS if setting.name != BASELINE]
    for level, setting in enumerate(names):
        values = ratios(rows, setting, "wall_ms")
        axes.plot(values, [level] * len(values), "o", alpha=0.5)
        axes.plot([statistics.median(values)], [level], "k|", markersize=22)
    axes.axvline(1.03, linestyle="--", color="grey")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.5, len(names) - 0.5)
    axes.set_xlabel(f"decode step time over '{BASELINE}' (dots: rounds, bar: median, dashes: 1.03)")
    path = folder / "idle_cost.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def main() -> int:
    """Run the benchmark from the command line."""
    parser = benchmark_parser(__doc__, smoke="few short rounds; into .cache/idle_cost unless told otherwise")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--starts", type=int, default=5)
    args = parser.parse_args()
    if args.smoke:
        vars(args).update(SMOKE, out=args.out or Path(".cache/idle_cost"))
    if args.rounds < 2:
        parser.error("--rounds must be at least 2 for quartiles")
    exit_on_first_signal()
    out = args.out or hardware_folder()
    info = run_info(model="llama-gqa (tiny, random)", rounds=args.rounds, num_tokens=args.num_tokens)
    try:
        starts = measure_starts(args.starts, Path(".cache/logs"))
        write_table(out, FIRST_TOKEN, starts, info)
        rows = measure(args.rounds, args.batch_size, args.num_tokens, Path(".cache/logs"))
    except ServerError as error:
        print(f"idle_cost: {error}", file=sys.stderr)
        return 1
    write_table(out, IDLE_COST, rows, info)
    plot(out)
    for measured in ("ready_s", "first_token_s", "cpu_s"):
        values = ratios(starts, SETTINGS[1].name, measured)
        middle = f"median {statistics.median(values):.3f}, range {min(values):.3f} to {max(values):.3f}"
        print(f"{SETTINGS[1].name} / {BASELINE}, {measured}: {middle}, {len(values)} starts")
    for setting in SETTINGS:
        if setting.name != BASELINE:
            for measured in ("wall_ms", "cpu_ms"):
                print(summary(rows, setting.name, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
