"""One server with as many processes as there can be: two tokenizer workers, two replicas.

Its launcher made the record of arguments with no plugin loaded and spawned the process that serves, as trainers do;
nothing but the environment switches the policy on.
"""

import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, oracle, six_prompts
from tests.support.harness.server import Server

pytestmark = pytest.mark.server

MODEL = tiny_model_path("llama-gqa")
SETTING = Setting(budget=21, buffer=12)
NUM_TOKENS = 90
LAUNCHER = Path(__file__).parent / "launcher" / "record.py"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ["--model-path", str(MODEL), "--tokenizer-worker-num", "2", "--dp-size", "2"]
    # Each worker would warm up by requests of its own, and the server is ready when the first has: the counters below
    # would take those of the other in.
    flags += ["--skip-server-warmup"]
    env = {"RKV_SGLANG_ARGS": shlex.join(SETTING.flags), "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with Server(flags, command=[sys.executable, str(LAUNCHER)], env=env, with_probe=False) as running:
        yield running


def answer(server: Server, prompt: tuple[int, ...]) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    # A connection of its own, so that the kernel may give it to either worker.
    body = {"input_ids": list(prompt), "sampling_params": params}
    found = requests.post(f"{server.url}/generate", json=body, headers={"Connection": "close"}, timeout=120)
    found.raise_for_status()
    return dict(found.json())


def replicas(server: Server) -> list[dict[str, Any]]:
    states = requests.get(f"{server.url}/server_info", timeout=60).json()["internal_states"]
    return [state["kv_policy_stats"] for state in states]


def test_all_answers_are_the_oracles_and_the_replicas_counters_add_up(server):
    before = replicas(server)
    assert len(before) == 2
    prompts = six_prompts() * 3
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: answer(server, prompt), prompts))
    for prompt, found in zip(prompts, answers, strict=True):
        expected = oracle(MODEL, prompt, NUM_TOKENS, SETTING, found["output_ids"])
        assert_same_tokens(found["output_ids"], expected, "one of many")
        # Of either worker, and no list of values.
        info = found["meta_info"]
        assert (info["kv_policy"], info["kv_compactions"]) == ("rkv", len(expected.compactions))
    after = replicas(server)
    grown = {name: [b[name] - a[name] for a, b in zip(before, after, strict=True)] for name in ("compactions",)}
    assert sum(grown["compactions"]) == sum(found["meta_info"]["kv_compactions"] for found in answers)
    assert all(count > 0 for count in grown["compactions"])
    assert sum(b["requests_answered"] - a["requests_answered"] for a, b in zip(before, after, strict=True)) == 18
    assert [state["settings"]["budget"] for state in after] == [SETTING.budget] * 2


def test_there_are_two_tokenizer_workers(server):
    assert server._process is not None
    titles = [" ".join(p.cmdline()) for p in psutil.Process(server._process.pid).children(recursive=True)]
    assert sum("tokenizer_worker" in title for title in titles) == 2, titles
