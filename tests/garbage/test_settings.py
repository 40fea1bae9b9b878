"""Garbage in flags, parameters and requests: what is no setting is refused in one line, and nothing is kept of it."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

from rkv_sglang import policy_names
from rkv_sglang.config import ARGS_VARIABLE, MOST_TOKENS, PolicyConfig
from rkv_sglang.integration.doctor.arguments import read_arguments, server_parser
from rkv_sglang.integration.doctor.command_line import read_launch
from rkv_sglang.integration.runtime.prefixes.asked import asked_of, refuse_other_repeat, refuse_sizes
from rkv_sglang.integration.runtime.requests import config_for, marked_prompt_len, wants_trace
from rkv_sglang.integration.startup import environment
from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.server_args import RKVServerArgs, config_from_args, read_config
from rkv_sglang.policies import POLICIES, make_policy
from tests.garbage.neighbours import any_value, assert_flat, assert_one_line, damaged, mutated, nested, with_wish

SERVER = PolicyConfig(budget=32, buffer=16, trace=True)
POOL = 4096
REQUEST = {
    "kv_policy": "rkv",
    "kv_budget": 64,
    "kv_buffer": 16,
    "kv_trace": True,
    "kv_prompt_len": 9,
    "kv_prompt_budget": 40,
    "of_others": {"a": [1]},
}
# As Python callers may give them, past what JSON holds.
OBJECTS: tuple[Any, ...] = (
    object(),
    b"kv",
    {1, 2},
    (1,),
    10**5000,
    1j,
    nested(5000),
    {"kv_budget": nested(5000)},
    type,
)


def assert_settings(config: PolicyConfig | None) -> None:
    if config is not None:
        assert type(config.budget) is int and type(config.buffer) is int
        assert SERVER.window < config.budget and config.buffer >= 1 and config.capacity < POOL
        assert type(config.prompt_budget) is int
        assert config.prompt_budget == 0 or config.least_prompt_budget <= config.prompt_budget <= MOST_TOKENS


def asked(custom_params: Any) -> None:
    """Read what a request asks: either settings come out, or one line."""
    try:
        assert_settings(config_for(custom_params, SERVER, POOL))
        assert isinstance(wants_trace(custom_params, SERVER), bool)
        assert 1 <= marked_prompt_len(custom_params, 10) <= 10
        wish = asked_of(custom_params)
        if wish is not None and wish.action == "create":
            refuse_sizes(wish, 200, SERVER, page_size=1)
            refuse_other_repeat(wish, range(200))
    except ValueError as error:
        assert_one_line(str(error))


def test_a_request_gets_its_settings_or_one_line(rng: random.Random) -> None:
    def some() -> None:
        asked(any_value(rng) if rng.random() < 0.2 else mutated(rng, with_wish(rng, REQUEST)))

    assert_flat(some)
    for value in OBJECTS:
        asked(value)
        for field in (*REQUEST, "kv_prefix"):
            asked({field: value})
        asked({"kv_prefix": {"create": "a", "length": value, "budget": value}})
        asked({"kv_prefix": {"create": value, "length": 100, "budget": 32, "judge": value}})
        asked({"kv_prefix": {"delete": value}})
        asked({"kv_prefix": {"list": value}})
        asked({"kv_policy": "none", "kv_x": value})


def test_names_of_others_are_left_alone_and_names_like_ours_are_not(rng: random.Random) -> None:
    for _ in range(300):
        name = "".join(rng.choices("kvr_xKV \n\u00df", k=rng.randrange(1, 9)))
        is_ours = name.lower().startswith(("kv_", "rkv_")) or name.lower() in ("kv", "rkv")
        if is_ours:
            with pytest.raises(ValueError, match=r"^custom_params has no ") as caught:
                config_for({name: 1}, SERVER, POOL)
            assert_one_line(str(caught.value))
        else:
            assert config_for({name: any_value(rng)}, SERVER, POOL) == SERVER


SETTINGS: dict[str, Any] = {
    "kv_policy": "rkv",
    "kv_granularity": "head",
    "kv_budget": 64,
    "rkv_budget": 64,
    "kv_buffer": 16,
    "kv_window": 8,
    "kv_prompt_budget": 40,
    "rkv_mix_lambda": 0.1,
    "rkv_kernel_size": 7,
    "rkv_similarity_threshold": 0.5,
    "kv_stagger": True,
    "rkv_stagger": True,
    "kv_trace": False,
    "kv_policy_config": {"mix_lambda": 0.2, "kernel_size": 5},
}


# What is given as text may be the path of somebody's file.
NO_PARAMETERS: dict[str, Any] = {"kv_policy_config": {}}


@pytest.fixture(autouse=True)
def no_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look through all installed packages takes longer than all else here."""
    monkeypatch.setattr(policy_names, "entry_points", lambda **asked: ())


def read(settings: dict[str, Any]) -> None:
    args = RKVServerArgs(model_path="m", **settings)
    _, problems = read_config(args)
    for problem in problems:
        assert_one_line(problem)
        assert "--" in problem
    if not problems:
        config = config_from_args(args)
        assert config.policy == "none" or make_policy(config)


def test_keywords_are_settings_or_one_line_each(rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Text that is no JSON is a path.
    monkeypatch.chdir(tmp_path)

    def some() -> None:
        settings = mutated(rng, SETTINGS)
        if isinstance(settings, dict):
            read({name: value for name, value in settings.items() if name in SETTINGS})

    assert_flat(some)
    for value in OBJECTS:
        for field in SETTINGS:
            read({"kv_policy": "rkv", field: value})
        read({"kv_policy": "rkv", "kv_policy_config": {"mix_lambda": value}})


def test_a_file_of_parameters_is_parameters_or_one_line(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "parameters"
    right = {name: json.dumps(vars(make_policy(PolicyConfig(policy=name)))).encode() for name in POLICIES}

    def some() -> None:
        name = rng.choice(list(POLICIES))
        changed = json.dumps(mutated(rng, json.loads(right[name]))).encode()
        path.write_bytes(damaged(rng, right[name]) if rng.random() < 0.5 else changed)
        read({"kv_policy": name, "kv_policy_config": str(path)})

    assert_flat(some, times=300)
    for content in ("[" * 100_000, '{"seed":' * 990, '{"seed": ' + "9" * 5000 + "}", '{"\\ud83d\\n": 1}', "\0"):
        path.write_text(content)
        read({"kv_policy": "random", "kv_policy_config": str(path)})


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return server_parser()


WORDS = (
    *("--kv-policy", "rkv", "--kv-budget", "64", "--rkv-budget=64", "--kv-trace", "--kv-policy-config", "{}"),
    *("--model-path", "m", "--rkv-mix-lambda", "0.5", "--kv-stagger", "--kv-window", "8"),
)


def test_a_command_line_is_read_or_every_fault_is_one_line(parser: argparse.ArgumentParser, rng: random.Random) -> None:
    def some() -> None:
        words = mutated(rng, list(WORDS), most=4)
        words = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
        options, problems = read_arguments(parser, words, is_serve=rng.random() < 0.5)
        for problem in problems:
            assert_one_line(problem)
        if hasattr(options, "kv_policy"):
            read({**{name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}, **NO_PARAMETERS})

    assert_flat(some, times=60)


def test_a_config_file_is_read_or_refused_in_one_line(
    parser: argparse.ArgumentParser, rng: random.Random, tmp_path: Path
) -> None:
    path = tmp_path / "server.yaml"
    right = {name.replace("_", "-"): value for name, value in SETTINGS.items() if not name.startswith("rkv_s")}
    # YAML holds all that JSON does.
    merged = ConfigArgumentMerger(parser)
    path.write_text(json.dumps(right))
    assert merged.merge_config_with_args(["--config", str(path)])

    def some() -> None:
        content = json.dumps(mutated(rng, right)).encode()
        path.write_bytes(damaged(rng, content) if rng.random() < 0.3 else content)
        options, problems = read_arguments(parser, ["--config", str(path), "--model-path", "m"])
        for problem in problems:
            assert_one_line(problem)
        if hasattr(options, "kv_policy"):
            read({**{name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}, **NO_PARAMETERS})

    assert_flat(some, times=60)


def test_the_environments_flags_are_read_or_refused_in_one_line(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = "--kv-policy rkv --kv-budget 64 --rkv-buffer=16 --kv-trace --kv-policy-config '{\"mix_lambda\": 0.2}'"
    outcomes: set[bool] = set()

    def some() -> None:
        words = mutated(rng, right.split(), most=2) if rng.random() < 0.7 else right.split()
        text = " ".join(map(str, words if isinstance(words, list) else [words])).encode("utf-8", "replace")
        text = damaged(rng, text) if rng.random() < 0.4 else text
        # No environment holds that byte.
        monkeypatch.setenv(ARGS_VARIABLE, text.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
        # A process has one such text.
        environment._read.cache_clear()
        try:
            args = RKVServerArgs(model_path="m")
        except RefusedError as error:
            assert_one_line(str(error))
            outcomes.add(False)
        else:
            for problem in read_config(args)[1]:
                assert_one_line(problem)
            outcomes.add(True)

    assert_flat(some, times=60)
    assert outcomes == {False, True}


def test_a_shells_line_is_taken_apart_or_refused_in_one_line(rng: random.Random) -> None:
    right = 'X=1 python -u -m sglang.launch_server --model-path m --kv-policy rkv --kv-policy-config \'{"a": 1}\' "b c"'

    def some() -> None:
        text = damaged(rng, right.encode()).decode("utf-8", rng.choice(("replace", "surrogateescape")))
        try:
            launch = read_launch(text)
        except ValueError as error:
            assert_one_line(str(error))
        else:
            assert all(isinstance(word, str) for word in launch.arguments)

    assert_flat(some)
