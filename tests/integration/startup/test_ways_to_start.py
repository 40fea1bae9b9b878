"""However a program starts SGLang, the variable switches the policy on in every process, or the start is refused."""

import json
from typing import Any

import pytest

from devtools.tiny_models import tiny_model_path
from tests.integration.children import Child
from tests.integration.startup.ways import BAD_VARIABLES, WAYS


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
    expected = {"policy": "snapkv", "budget": 96, "buffer": 32, "plugins": True, "hooks": True}
    assert results[way] == expected


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


@pytest.mark.parametrize("variable", BAD_VARIABLES)
@pytest.mark.parametrize("way", ["engine_from_keywords", "launch_of_a_record"])
def test_a_bad_variable_ends_the_start_in_one_line(results: dict[str, Any], way: str, variable: str) -> None:
    error = results[f"{way} {variable}"]["error"]
    assert error.startswith("RefusedError: ") and "\n" not in error, error
    assert "RKV_SGLANG_ARGS cannot be used (" in error or "--kv-budget 4 must be greater than --kv-window" in error


@pytest.mark.parametrize("way", ["late --enable-lmcache", "late "])
def test_what_cannot_be_combined_is_refused_though_it_was_resolved_before(results: dict[str, Any], way: str) -> None:
    error = results[way]["error"]
    assert error.startswith("RefusedError: ") and "cannot be combined with --kv-policy snapkv" in error, error
