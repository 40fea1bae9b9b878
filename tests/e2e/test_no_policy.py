"""A server without a policy pays next to nothing for the installed package."""

import time
from pathlib import Path

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import six_prompts
from tests.support.harness.environment import PROBE_DIR, PROJECT_ROOT
from tests.support.harness.server import Server

CENSUS_DIR = Path(__file__).parent / "census"
MOST_MODULES = 15


@pytest.mark.server
def test_no_process_of_a_server_without_a_policy_loads_more_than_the_doors(tmp_path, request):
    env = {"PYTHONPATH": f"{CENSUS_DIR}:{PROBE_DIR}:{PROJECT_ROOT}", "RKV_CENSUS_DIR": str(tmp_path)}
    with Server(["--model-path", str(tiny_model_path("llama-gqa"))], env=env, with_probe=False) as server:
        answer = server.generate(list(six_prompts()[0]), {"max_new_tokens": 4})
        assert "kv_policy" not in answer["meta_info"]
        # Every process counts again after the answer.
        time.sleep(1)
        loaded = {file.name: file.read_text().split() for file in tmp_path.iterdir() if not file.name.startswith(".")}
    # At least the launcher and the scheduler.
    assert len(loaded) >= 2
    for modules in loaded.values():
        assert "rkv_sglang.integration.plugin" in modules
        assert len(modules) <= MOST_MODULES, modules
    request.node.user_properties.append(("report", f"modules a process: {sorted(map(len, loaded.values()))}"))
