"""Ask a server every problem as often as wanted, many at a time, and keep each answer when it is done."""

import hashlib
import json
import time
import urllib.error
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy.checker import UNJUDGED
from benchmarks.accuracy.judge import Judge, judged
from benchmarks.accuracy.problems import Problem
from benchmarks.accuracy.store import Sample, SampleStore
from benchmarks.common.asking import ask_side_by_side
from benchmarks.common.settings import Setting, as_file_name
from devtools.launch import Server, ServerError, has_gpu, launched_server
from rkv_sglang.client.http import open_url

# A large model is read from a disk, and a busy machine is slow.
STARTUP_TIMEOUT_S = 7200
# Follows every problem.
INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How every problem is asked. ``instruction`` follows the question, in the same user message."""

    instruction: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int

    def request(self, problem: Problem, sample: int) -> dict[str, Any]:
        """Return the body for ``/v1/chat/completions``; the same sample has the same seed under every setting."""
        digest = hashlib.sha256(f"{self.seed} {problem.key} {sample}".encode()).digest()
        return {
            "model": "default",
            "messages": [{"role": "user", "content": f"{problem.question}\n\n{self.instruction}"}],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": int.from_bytes(digest[:4], "big") >> 1,
            "return_meta_info": True,
        }


@contextmanager
def setting_server(model: str, setting: Setting, server_args: Sequence[str], log_dir: Path) -> Iterator[Server]:
    """Run the server of a setting for the length of a ``with`` block."""
    log_path = log_dir / f"accuracy_{as_file_name(setting.name)}.log"
    flags = (*setting.flags, *server_args)
    with launched_server(model, *flags, log_path=log_path, startup_timeout_s=STARTUP_TIMEOUT_S) as server:
        yield server


def num_devices(server: Server) -> int:
    """Return how many accelerators a server uses; 1 on a machine without."""
    if not has_gpu():
        return 1
    args: dict[str, Any] = server.get_json("/server_info")
    return int(args["tp_size"]) * int(args["pp_size"]) * int(args["dp_size"])


def run_samples(
    server: Server,
    store: SampleStore,
    todo: Sequence[tuple[Problem, int]],
    sampling: Sampling,
    concurrency: int,
    timeout_s: float,
    judge: Judge,
) -> None:
    """Ask for the samples in ``todo``, each a problem and a number from 0, and put them into the store.

    An interrupt ends it at once: the server ends next, and with it the requests under way.

    Raises:
        ServerError: A request failed. No further ones were sent, and all answers that came are in the store.
    """
    devices = num_devices(server)
    failures: list[ServerError] = []

    def ask(wanted: tuple[Problem, int]) -> tuple[dict[str, Any], float, float] | None:
        try:
            return None if failures else ask_server(server, sampling.request(*wanted), timeout_s)
        except ServerError as error:
            failures.append(error)
            return None

    answers = ask_side_by_side(ask, todo, concurrency)
    for (problem, sample), answer in tqdm(
        answers, total=len(todo), desc=server.log_path.stem, unit="sample", mininterval=2
    ):
        if answer is not None:
            store.add(judged(judge, problem, collect_sample(problem, sample, devices, *answer)))
    if failures:
        raise failures[0]


def ask_server(server: Server, body: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], float, float]:
    """Return the answer's JSON and when it was asked and had.

    Raises:
        ServerError: It refused or did not answer; one line.
    """
    data = json.dumps(body).encode()
    start = time.time()
    try:
        with open_url(server.url + "/v1/chat/completions", body=data, timeout_s=timeout_s) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace").strip().splitlines() or [str(error)]
        raise ServerError(f"the server refused a request: {reason[0][:300]} (its log: {server.log_path})") from error
    except OSError as error:
        raise ServerError(f"a request failed ({error}); the server's log: {server.log_path}") from error
    return answer, start, time.time()


def collect_sample(
    problem: Problem, sample: int, devices: int, answer: dict[str, Any], start: float, end: float
) -> Sample:
    """Return what a server answered and when, not judged."""
    choice, usage = answer["choices"][0], answer["usage"]
    info = choice.get("meta_info") or {}
    return Sample(
        problem=problem.key,
        sample=sample,
        outcome=UNJUDGED,
        found="",
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        finish_reason=choice["finish_reason"],
        compactions=info.get("kv_compactions", 0),
        evicted_tokens=info.get("kv_evicted_tokens", 0),
        start=start,
        end=end,
        devices=devices,
        # With a reasoning parser SGLang splits the thoughts off, and an answer cut off within them has no content.
        text=choice["message"].get("content") or "",
    )
