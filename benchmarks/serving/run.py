"""The runs of the benchmark: which servers are up when, and what is asked of them."""

import argparse
import contextlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.asking import entered_side_by_side
from benchmarks.common.prompts import load_prompts
from benchmarks.common.schema import Row, write_table
from benchmarks.common.settings import Setting, as_file_name
from benchmarks.common.tables import SERVING
from benchmarks.serving.client import replay
from benchmarks.serving.rows import request_figures, require_equal_memory
from benchmarks.serving.servers import (
    COMMON_FLAGS,
    CPU_FLAGS,
    MOST_RUNNING_ON_CPU,
    MOST_RUNNING_ON_GPU,
    PeakMemory,
    pool_flags,
    running_requests,
    server_environment,
    server_memory,
)
from benchmarks.serving.trace import LOCKSTEP, Conversation, TraceSpec, make_trace
from devtools.chat import chat_ids
from devtools.launch import Server, has_gpu, launched_server
from rkv_sglang.plan_command import model_shape
from rkv_sglang.sizes.memory_plan import ModelShape

WARM_UP_SEED = -1
LOG_DIR = Path(".cache/logs/serving")


def trace_spec(options: argparse.Namespace, arrivals: str) -> TraceSpec:
    """Return what the traces of this kind of arrivals are drawn from."""
    return TraceSpec(
        num_requests=options.num_requests,
        prompt_len=options.prompt_len,
        output_len=options.output_len,
        turns=options.turns,
        shared_prompts=options.shared_prompts,
        shared_len=options.shared_len,
        arrivals=arrivals,
        rate=options.rate,
    )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All that is the same for every run."""

    options: argparse.Namespace
    model: str
    shape: ModelShape
    vocabulary: list[int]
    questions: list[list[int]]

    @property
    def server_flags(self) -> list[str]:
        """Flags that every server has."""
        on_cpu = () if has_gpu() else CPU_FLAGS
        return [*COMMON_FLAGS, *on_cpu, *shlex.split(self.options.server_flags)]

    def trace(self, arrivals: str, round_index: int) -> list[Conversation]:
        """Return the trace of a round."""
        spec = trace_spec(self.options, arrivals)
        # Rounds must not find each other's prompts, and arrivals must not change what is asked.
        seed = self.options.seed * 1000 + round_index
        return make_trace(spec, seed, self.vocabulary, self.questions)

    def warm_up_trace(self) -> list[Conversation]:
        """Return a few short requests that are compacted under every policy of the run."""
        capacity = max((s.config.capacity for s in self.options.settings if s.config is not None), default=0)
        output_len = min(capacity + 2, self.options.output_len[1])
        spec = replace(trace_spec(self.options, LOCKSTEP), num_requests=2, turns=1, output_len=(output_len, output_len))
        return make_trace(spec, WARM_UP_SEED, self.vocabulary)


def make_bench(options: argparse.Namespace) -> Bench:
    """Look up what the runs need of the model."""
    from transformers import AutoTokenizer

    if options.model is None:
        # It imports every model class it can make, which a run with another model does not need.
        from devtools.tiny_models import BENCHMARK_MODEL, tiny_model_path

        options.model = str(tiny_model_path(BENCHMARK_MODEL))
    if Path(options.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    special = set(tokenizer.all_special_ids)
    questions = load_prompts(options.questions, options.num_requests * options.turns) if options.questions else []
    return Bench(
        options=options,
        model=options.model,
        # Without a GPU servers compute in fp32, whatever the checkpoint has.
        shape=shape_in_use(options.model),
        vocabulary=[token for token in range(len(tokenizer)) if token not in special],
        questions=[chat_ids(tokenizer, question) for question in questions],
    )


def shape_in_use(model: str) -> ModelShape:
    """Return the model's shape with the numbers' sizes that servers here use."""
    shape = model_shape(model, 1, None)
    return shape if has_gpu() else replace(shape, kv_itemsize=4, query_itemsize=4)


def sessions(options: argparse.Namespace) -> Iterator[tuple[float, list[tuple[str, int, Setting]]]]:
    """Yield what is run while the same servers are up: the pool, and (arrivals, round, setting) in order."""
    for pool in options.pools:
        runs = [
            (arrivals, i, setting)
            for i in range(options.rounds)
            for arrivals in options.arrivals
            for setting in (options.settings if i % 2 == 0 else options.settings[::-1])
        ]
        if has_gpu():
            # One server fills the GPU.
            yield from ((pool, [run]) for run in runs)
        else:
            yield pool, runs


def measure(bench: Bench, out: Path, info: dict[str, Any]) -> list[Row]:
    """Run everything, and write the rows that there are whenever servers end."""
    options = bench.options
    rows: list[Row] = []
    total = len(options.pools) * options.rounds * len(options.arrivals) * len(options.settings)
    with tqdm(total=total, desc="runs", unit="run") as progress:
        for pool, runs in sessions(options):
            with warm_servers(bench, pool, list({run[2].name: run[2] for run in runs}.values())) as servers:
                for arrivals, round_index, setting in runs:
                    progress.set_postfix_str(f"pool {pool:g}, {arrivals}, round {round_index + 1}, {setting.name}")
                    rows.append(run_once(bench, servers[setting.name], setting, pool, arrivals, round_index))
                    progress.update()
                    row = rows[-1]
                    tqdm.write(
                        f"pool {pool:g} round {round_index} {arrivals} {setting.name}: {row['tokens_per_s']} tokens/s "
                        f"in {row['seconds']} s, running {row['mean_running']} (peak {row['peak_running']}), "
                        f"{row['retractions']} retractions, {row['compactions']} compactions {row['note']}"
                    )
            require_equal_memory(rows)
            write_table(out, SERVING, rows, info)
    return rows


@contextlib.contextmanager
def warm_servers(bench: Bench, pool: float, settings: list[Setting]) -> Iterator[dict[str, Server]]:
    """Run the servers of a pool, by the names of their settings, side by side; all have answered something."""
    most_running = MOST_RUNNING_ON_GPU if has_gpu() else MOST_RUNNING_ON_CPU
    contexts = {}
    for setting in settings:
        flags = (*bench.server_flags, *setting.flags, *pool_flags(setting, pool, bench.shape, most_running))
        log_path = LOG_DIR / f"{as_file_name(setting.name)}_{pool:g}.log"
        environment = {**server_environment(), **setting.environment}
        contexts[setting.name] = launched_server(bench.model, *flags, log_path=log_path, environment=environment)
    with entered_side_by_side(contexts) as servers:
        for server in servers.values():
            replay(server.url, bench.warm_up_trace(), timeout_s=bench.options.timeout)
        yield servers


def run_once(bench: Bench, server: Server, setting: Setting, pool: float, arrivals: str, round_index: int) -> Row:
    """Replay the trace of a round on one server and return its row."""
    trace = bench.trace(arrivals, round_index)
    server.flush_cache()
    offset = server.log_path.stat().st_size
    num_requests = sum(len(conversation.turns) for conversation in trace)
    with (
        PeakMemory(server).watched() as peak,
        tqdm(total=num_requests, desc=setting.name, unit="request", leave=False) as progress,
    ):
        records = replay(
            server.url,
            trace,
            timeout_s=bench.options.timeout,
            ignore_eos=not bench.options.natural_end,
            progress=progress,
        )
    with server.log_path.open(errors="replace") as log:
        log.seek(offset)
        peak_running, mean_running = running_requests(log.read())
    memory = server_memory(server, setting, bench.shape)
    return {
        "arrivals": arrivals,
        "pool": pool,
        "round": round_index,
        "setting": setting.name,
        "policy": setting.policy,
        "budget": setting.budget,
        "buffer": setting.buffer,
        "pool_tokens": memory.pool_tokens,
        "side_bytes": memory.side_bytes,
        "memory_bytes": memory.memory_bytes,
        "trace_tokens": sum(conversation.num_tokens for conversation in trace),
        "peak_running": peak_running,
        "mean_running": round(mean_running, 2),
        "peak_memory_bytes": peak.num_bytes,
        **request_figures(records, setting.config),
    }
