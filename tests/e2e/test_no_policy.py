"""A server without a policy is stock SGLang, as the harness runs it, and pays next to nothing for the package."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import random_ids
from tests.support.harness.environment import PROBE_DIR, PROJECT_ROOT
from tests.support.harness.server import Server
from tests.support.oracle.dense import dense_generate

pytestmark = pytest.mark.server

MODEL = tiny_model_path("llama-gqa")
CENSUS_DIR = Path(__file__).parent / "census"
MOST_MODULES = 15
NEVER = 10**9


@pytest.fixture(scope="module")
def census_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("census")


@pytest.fixture(scope="module")
def server(census_folder: Path) -> Iterator[Server]:
    env = {"PYTHONPATH": f"{CENSUS_DIR}:{PROBE_DIR}:{PROJECT_ROOT}", "RKV_CENSUS_DIR": str(census_folder)}
    with Server(["--model-path", str(MODEL), "--page-size", "16"], env=env, fresh=True) as server:
        yield server


def test_no_process_of_a_server_without_a_policy_loads_more_than_the_doors(server, census_folder, rng, request):
    answer = server.generate(random_ids(rng, 74), {"max_new_tokens": 4})
    assert "kv_policy" not in answer["meta_info"]
    # Every process counts again after the answer.
    time.sleep(1)
    loaded = {file.name: file.read_text().split() for file in census_folder.iterdir() if file.name[0] != "."}
    # At least the launcher and the scheduler.
    assert len(loaded) >= 2
    for modules in loaded.values():
        assert "rkv_sglang.integration.plugin" in modules
        assert len(modules) <= MOST_MODULES, modules
    request.node.user_properties.append(("report", f"modules a process: {sorted(map(len, loaded.values()))}"))


def test_a_server_serves_streams_aborts_and_goes(server, rng):
    """The last of this file: the server is gone after it."""
    prompts = [random_ids(rng, 20) for _ in range(3)]
    greedy = {"max_new_tokens": 20, "ignore_eos": True}
    assert server._process is not None
    processes = [psutil.Process(server._process.pid), *psutil.Process(server._process.pid).children(recursive=True)]
    answers = server.generate_many(prompts, greedy)
    expected = [dense_generate(MODEL, prompt, 20, budget=NEVER, buffer=1).output_ids for prompt in prompts]
    assert [answer["output_ids"] for answer in answers] == expected
    chunks = list(server.stream(prompts[0], greedy))
    assert chunks[-1]["output_ids"][-20:] == answers[0]["output_ids"]
    assert chunks[-1]["meta_info"]["cached_tokens"] == 16
    stream = server.stream(prompts[1], {**greedy, "max_new_tokens": 3000}, rid="endless")
    next(stream)
    server.abort("endless")
    assert list(stream)[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.server_info()["page_size"] == 16
    server.drain()
    server.flush_cache()
    server.generate(prompts[0], {**greedy, "max_new_tokens": 5})
    server.assert_clean()
    server.close()
    assert server.probe().idles[-1]["ok"]
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
