"""However a program starts SGLang, the variable switches the policy on in every process, or the start is refused."""

import json
from typing import Any

import pytest

from devtools.tiny_models import tiny_model_path
from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.server_args import RKVServerArgs, config_from_args
from tests.integration.children import Child
from tests.integration.startup.ways import WAYS


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = str(tiny_model_path("llama-gqa"))
    child = Child(tmp_path_factory.mktemp("ways"), ["-m", "tests.integration.startup.ways", model])
    status, out, err = child.finish()
    assert status == 0, err[-4000:]
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT")]
    return dict(json.loads(line.removeprefix("RESULT")))


@pytest.mark.parametrize("way", list(WAYS))
def test_the_variable_reaches_every_process_of_every_way_to_start(results: dict[str, Any], way: str) -> None:
    expected = {"policy": "snapkv", "budget": 96, "buffer": 32, "hooks": True}
    assert results[way] == expected


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(
    ("lack", "why"),
    [
        ("with_a_silent_scheduler", "--kv-policy is set but a scheduler process runs without it"),
        ("without_the_plugin_in_the_launcher", "the process that started this scheduler runs without the plugin: load"),
    ],
)
def test_no_way_to_start_serves_if_one_process_lacks_the_plugin(
    results: dict[str, Any], way: str, lack: str, why: str
) -> None:
    assert why in results[f"{way} {lack}"]["error"]


def test_without_the_variable_a_record_made_before_the_plugin_starts_stock(results: dict[str, Any]) -> None:
    stock = {name: result for name, result in results.items() if name.endswith("without the variable")}
    assert len(stock) == 2 and all(result == {"policy": "none"} for result in stock.values()), stock


def test_a_scheduler_refuses_a_launcher_without_the_plugin(results: dict[str, Any]) -> None:
    error = results["scheduler_of_a_launcher_without_the_plugin"]["error"]
    assert "RKV_SGLANG_ARGS is set, but the process that started this scheduler runs without the plugin: load" in error
    assert "\n" not in error


def test_an_engine_with_launch_of_its_own_refuses_schedulers_without_the_policy(results: dict[str, Any]) -> None:
    error = results["engine_whose_schedulers_say_nothing"]["error"]
    assert "--kv-policy is set but a scheduler process runs without it" in error


def test_a_bad_variable_ends_the_start_in_one_line(results: dict[str, Any]) -> None:
    error = results["bad variable"]["error"]
    assert error.startswith("RefusedError: RKV_SGLANG_ARGS cannot be used (") and "\n" not in error, error


def test_what_cannot_be_combined_is_refused_though_it_was_resolved_before(results: dict[str, Any]) -> None:
    error = results["refused_late"]["error"]
    assert error.startswith("RefusedError: --enable-lmcache cannot be combined with --kv-policy snapkv"), error


@pytest.mark.parametrize(
    ("variable", "why"),
    [
        ("--kv-budget 64", "it names no --kv-policy"),
        ("--kv-policy rvk", "invalid choice: 'rvk'"),
        ("--kv-policy rkv --pp-size 2", "--pp-size is no flag of the KV policy"),
        ("--kv-policy rkv --kv-policy-config file.json", "its --kv-policy-config is no JSON object"),
        ("--kv-policy rkv --kv-budget 'x", "No closing quotation"),
        ("--kv-policy rkv --kv-budget many", "invalid int value: 'many'"),
    ],
)
def test_a_variable_that_cannot_be_read_says_why(monkeypatch: pytest.MonkeyPatch, variable: str, why: str) -> None:
    monkeypatch.setenv("RKV_SGLANG_ARGS", variable)
    with pytest.raises(RefusedError) as caught:
        RKVServerArgs(model_path="m")
    message = str(caught.value)
    assert message.startswith("RKV_SGLANG_ARGS cannot be used (") and message.endswith("): mend it or unset it")
    assert why in message and "\n" not in message


def test_the_variable_and_settings_of_the_record_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKV_SGLANG_ARGS", "--kv-policy rkv --kv-budget 64")
    assert config_from_args(RKVServerArgs(model_path="m")).budget == 64
    # As it comes from another process.
    assert RKVServerArgs(model_path="m", kv_policy="rkv", kv_budget=64).kv_budget == 64
    with pytest.raises(RefusedError, match=r"^RKV_SGLANG_ARGS and kv_budget are both set, and one place decides: "):
        RKVServerArgs(model_path="m", kv_budget=65)
    monkeypatch.setenv("RKV_SGLANG_ARGS", "--kv-policy none")
    assert RKVServerArgs(model_path="m", kv_policy="snapkv").kv_policy == "snapkv"
