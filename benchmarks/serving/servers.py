"""The servers that are compared: their flags, the memory each may use, and what they say of themselves."""

import bisect
import contextlib
import os
import re
import statistics
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import settings
from benchmarks.common.settings import STOCK_ENVIRONMENT, Setting
from devtools.launch import Server, ServerError, has_gpu
from rkv_sglang.client.http import open_url
from rkv_sglang.config import PolicyConfig
from rkv_sglang.policies import is_stateful, make_policy, memory_numbers
from rkv_sglang.sizes.memory_plan import ModelShape
from rkv_sglang.sizes.query_rows import num_query_rows

STOCK, FP8 = "stock", "fp8"
# Tokens singly and at once, as differences; the log tells the batch size every so many decode steps.
COMMON_FLAGS = (
    *("--stream-interval", "1", "--incremental-streaming-output"),
    *("--enable-metrics", "--decode-log-interval", "10"),
)
# Where several servers share the cores, an idle one must not poll.
CPU_FLAGS = ("--sleep-on-idle",)
CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
# Most requests that may run at once: what ``launch`` sets on a CPU; on a GPU, SGLang's own upper limit.
MOST_RUNNING_ON_CPU, MOST_RUNNING_ON_GPU = 64, 4096
_RUNNING = re.compile(r"Decode batch.*?#running-req: (\d+)")
_SIDE_BYTES = re.compile(r"^rkv:side_buffer_bytes(?:\{.*\})? (\S+)$", re.MULTILINE)


def parse_setting(text: str) -> Setting:
    """Return the setting called ``none``, ``stock``, ``fp8``, or as every benchmark names it (``rkv:64:32:stagger``).

    Raises:
        ValueError: It is none of these, or cannot run here; one line.
    """
    if text == STOCK:
        return Setting(text, environment=STOCK_ENVIRONMENT)
    if text == FP8:
        if not has_gpu():
            raise ValueError("the setting fp8 needs a GPU: leave it out of --settings")
        return Setting(text, own_flags=("--kv-cache-dtype", "fp8_e4m3"))
    try:
        return settings.parse_setting(text)
    except ValueError as error:
        raise ValueError(f"{error}; here also {STOCK} and {FP8}") from error


def query_window_bytes(shape: ModelShape, config: PolicyConfig, pool: int, max_requests: int) -> int:
    """Return the bytes of the query window of a server with a pool of ``pool`` tokens, unread row and map included."""
    row = shape.num_layers * config.window * shape.num_qo_heads * shape.head_dim * shape.query_itemsize
    return (num_query_rows(config, pool, max_requests) + 1) * row + (max_requests + 1) * 8


def carried_bytes(shape: ModelShape, config: PolicyConfig, pool: int) -> int:
    """Return the bytes that requests carry for a policy when the pool is full of compacted requests."""
    policy = make_policy(config)
    numbers = memory_numbers(policy, shape.num_qo_heads // shape.num_kv_heads, shape.head_dim)
    own = numbers * shape.query_itemsize + (4 * (config.budget - config.window) if is_stateful(policy) else 0)
    each = shape.num_layers * shape.num_kv_heads * own
    return -(-pool // config.capacity) * each


def policy_pool(shape: ModelShape, config: PolicyConfig, pool: int, max_requests: int) -> int:
    """Return the most tokens that, with a policy's buffers, take no more bytes than ``pool`` tokens without one."""

    def num_bytes(tokens: int) -> int:
        own = query_window_bytes(shape, config, tokens, max_requests) + carried_bytes(shape, config, tokens)
        return tokens * shape.kv_bytes + own

    # The bytes rise with the tokens.
    return bisect.bisect_right(range(pool + 1), pool * shape.kv_bytes, key=num_bytes) - 1


def pool_flags(setting: Setting, pool: float, shape: ModelShape, max_requests: int) -> tuple[str, ...]:
    """Return the flags that give a server its memory, the same number of bytes whatever the setting.

    Args:
        setting: The server's.
        pool: Below 1, ``--mem-fraction-static``: SGLang sizes its pool, and the plugin takes its buffers off. Otherwise
            the tokens of a pool without a policy, from which the policy's buffers are taken off here.
        shape: The model's, with the KV dtype of an ordinary server.
        max_requests: Most requests that may run at once.
    """
    if pool < 1:
        return ("--mem-fraction-static", str(pool))
    tokens = int(pool)
    if setting.name == FP8:
        tokens *= shape.kv_itemsize
    if setting.config is not None:
        tokens = policy_pool(shape, setting.config, tokens, max_requests)
    return ("--max-total-tokens", str(tokens))


@dataclass(frozen=True)
class ServerMemory:
    """What a server reserved: tokens of its KV pool, bytes of its policy's buffers, bytes of both."""

    pool_tokens: int
    side_bytes: int
    memory_bytes: int


def server_memory(server: Server, setting: Setting, shape: ModelShape) -> ServerMemory:
    """Ask a running server for its pool and side buffers.

    Raises:
        ServerError: It does not tell.
    """
    tokens = server.get_json("/server_info").get("max_total_num_tokens")
    if tokens is None:
        raise ServerError(f"/server_info has no max_total_num_tokens; log: {server.log_path}")
    own = 0
    if setting.config is not None:
        with open_url(server.url + "/metrics", timeout_s=60) as response:
            found = _SIDE_BYTES.findall(response.read().decode())
        if not found:
            raise ServerError(f"/metrics has no rkv:side_buffer_bytes; log: {server.log_path}")
        # The gauge knows the query window only: carried scores are made with the requests.
        own = int(max(map(float, found))) + carried_bytes(shape, setting.config, tokens)
    itemsize = 1 if setting.name == FP8 else shape.kv_itemsize
    return ServerMemory(tokens, own, tokens * shape.kv_bytes * itemsize // shape.kv_itemsize + own)


def running_requests(log: str) -> tuple[int, float]:
    """Return the largest and the mean batch over the decode steps that a server's log tells of; 0 and NaN of none."""
    sizes = [int(count) for count in _RUNNING.findall(log)]
    return max(sizes, default=0), statistics.mean(sizes) if sizes else float("nan")


class PeakMemory:
    """Most memory in use while the block runs: of the GPU, sampled, or the resident set of a server on a CPU."""

    def __init__(self, server: Server) -> None:
        self.num_bytes = 0
        self._server = server

    @contextlib.contextmanager
    def watched(self) -> Iterator["PeakMemory"]:
        """Watch during the block; ``num_bytes`` has the peak behind it."""
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,), daemon=True)
        if has_gpu():
            watcher.start()
        try:
            yield self
        finally:
            done.set()
            if has_gpu():
                watcher.join()
            else:
                self.num_bytes = sum(map(_peak_resident_bytes, _family(self._server.process)))

    def _watch(self, done: threading.Event) -> None:
        while True:
            self.num_bytes = max(self.num_bytes, gpu_memory_bytes())
            if done.wait(1):
                return


def gpu_memory_bytes() -> int:
    """Return the bytes in use on all GPUs, whoever uses them."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    return sum(int(line) for line in lines) * 2**20


def _family(process: psutil.Process) -> list[Any]:
    return [process, *process.children(recursive=True)]


def _peak_resident_bytes(process: psutil.Process) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def server_environment() -> dict[str, str]:
    """Return the variables of every server: on a CPU one thread each, so that servers do not fight for cores."""
    return {} if has_gpu() else {name: os.environ.get(name, value) for name, value in CPU_ENVIRONMENT.items()}
