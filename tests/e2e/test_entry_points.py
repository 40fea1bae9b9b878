"""Every way to start SGLang brings the policy, and none serves silently without it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from devtools.tiny_models import tiny_model_path
from tests.docs.pages import fences, page
from tests.e2e.workload import Setting, assert_same_tokens, greedy, oracle, six_prompts
from tests.integration.children import Child
from tests.support.harness.environment import PROBE_DIR, PROJECT_ROOT, device_flags
from tests.support.harness.scheduler import run_scheduler
from tests.support.harness.server import Server
from tests.support.once import served_once
from tests.support.oracle.dense import dense_generate
from tests.support.oracle.scores import ScoreInputs

MODEL = tiny_model_path("llama-gqa")
SETTING = Setting(budget=21, buffer=12)
NUM_TOKENS = 90
PROMPT = six_prompts()[1]
SABOTEUR_DIR = Path(__file__).parent / "saboteur"
THIRD_PARTY_DIR = PROJECT_ROOT / "tests" / "policies" / "third_party"

ENGINE_SCRIPT = """
import json, sys
import sglang

if __name__ == "__main__":
    model, prompt, device_options, documented = json.loads(sys.argv[1])
    names = {}
    exec(documented, names)
    engine = sglang.Engine(
        model_path=model, kv_policy="rkv", rkv_budget=21, rkv_buffer=12, max_total_tokens=4096,
        max_running_requests=8, **device_options
    )
    params = {"temperature": 0, "max_new_tokens": 90, "ignore_eos": True}
    answer = engine.generate(input_ids=prompt, sampling_params=params)
    info = engine.get_server_info()
    engine.shutdown()
    documented = [names["args"].kv_policy, names["args"].kv_budget]
    print("RESULT" + json.dumps([answer["output_ids"], info["internal_states"][0]["kv_policy_stats"], documented]))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``sglang serve``, which finds in a file that another package's policy compacts, its parameters in a FIFO."""
    folder = tmp_path_factory.mktemp("config")
    config, parameters = folder / "server.yaml", folder / "parameters"
    policy = f"kv-policy: every_nth\nkv-policy-config: {parameters}\n"
    config.write_text(f"{policy}rkv-budget: {SETTING.budget}\nrkv-buffer: {SETTING.buffer}\n")
    command = [str(Path(sys.executable).parent / "sglang"), "serve"]
    env = {"PYTHONPATH": f"{THIRD_PARTY_DIR}:{PROBE_DIR}:{PROJECT_ROOT}"}
    with (
        served_once(parameters, b'\xef\xbb\xbf{"stride": 3}'),
        Server(["--model-path", str(MODEL), "--config", str(config)], command=command, env=env, fresh=True) as server,
    ):
        yield server


def assert_every_third_stays(server: Server, prompt: tuple[int, ...], num_tokens: int) -> None:
    def every_third(inputs: ScoreInputs) -> torch.Tensor:
        num_kv_heads, resident_len, _ = inputs.keys.shape
        scored = range(resident_len - inputs.window_queries.shape[1])
        return inputs.keys.new_tensor([[float(i % 3 == 0) for i in scored]] * num_kv_heads)

    answer = server.generate(list(prompt), {"max_new_tokens": num_tokens, "ignore_eos": True})
    server.assert_clean()
    budget, buffer = SETTING.budget, SETTING.buffer
    found = answer["output_ids"]
    sizes = {"budget": budget, "buffer": buffer}
    expected = dense_generate(MODEL, prompt, num_tokens, **sizes, score=every_third, guessed_output_ids=found)
    assert_same_tokens(found, expected, "served")
    # With another policy it would have answered otherwise.
    assert found != oracle(MODEL, prompt, num_tokens, SETTING).output_ids


@pytest.mark.server
def test_sglang_serve_with_a_config_file_and_parameters_that_can_be_read_once(served):
    assert_every_third_stays(served, PROMPT, NUM_TOKENS)
    info = served.server_info()
    assert info["kv_policy_config"] == {"stride": 3}
    assert (info["kv_policy"], info["rkv_budget"], info["rkv_buffer"]) == ("every_nth", 21, 12)


@pytest.mark.server
def test_a_policy_of_another_package_serves(served):
    assert_every_third_stays(served, six_prompts()[0], 180)


@pytest.mark.server
def test_engine_with_keyword_arguments_and_server_args_as_documented(tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE_SCRIPT)
    flags = device_flags()
    options = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    (documented,) = [code for code in fences(page("docs/configuration.md"), "python") if "load_plugins" in code]
    argument = json.dumps([str(MODEL), list(PROMPT), options, documented])
    status, out, err = Child(tmp_path / "engine", [str(script), argument]).finish()
    assert status == 0, err[-4000:]
    result = next(line for line in out.splitlines() if line.startswith("RESULT"))
    output_ids, stats, settings = json.loads(result.removeprefix("RESULT"))
    expected = oracle(MODEL, PROMPT, NUM_TOKENS, SETTING, output_ids)
    assert_same_tokens(output_ids, expected, "engine")
    assert stats["compactions"] == len(expected.compactions)
    assert settings == ["rkv", 1024]


@pytest.mark.server
def test_a_plugin_that_fails_to_load_in_the_scheduler_stops_the_server():
    """SGLang itself logs such a failure and would serve uncompressed."""
    flags = ["--model-path", str(MODEL), *SETTING.flags]
    path = f"{SABOTEUR_DIR}:{PROBE_DIR}:{PROJECT_ROOT}"
    # `python -m` puts the current folder first, and with it the project's own egg-info: the
    # saboteur would come too late.
    env = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    exit_code, log = Server(flags, env=env, with_probe=False).start_and_expect_exit()
    assert exit_code != 0
    assert "--kv-policy is set but a scheduler process runs without it" in log
    assert "ready to roll" not in log


def test_tensor_parallel_ranks_compact_alike():
    flags = ["--model-path", str(MODEL), "--tp-size", "2", "--page-size", "16", *SETTING.flags]
    prompts = six_prompts()[:3]
    result = run_scheduler(
        flags,
        [greedy(prompt, NUM_TOKENS) for prompt in prompts],
        env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
        timeout=240,
    )
    result.assert_clean()
    for prompt, output in zip(prompts, result.outputs, strict=True):
        expected = oracle(MODEL, prompt, NUM_TOKENS, SETTING, output.output_ids)
        assert_same_tokens(output.output_ids, expected, "two ranks")
