"""The flags: every way to give them leads to the same settings, and a bad value ends in one line that names it."""

import argparse
import json
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from sglang.srt import runtime_context
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.server_args import GROUP_TITLE, RKVServerArgs, config_from_args, policy_name
from rkv_sglang.policies import SnapKV, policy_names
from tests.integration.children import Child
from tests.support.harness.environment import PROJECT_ROOT

# Not by SGLang's name for it, which another test's plugin loading may have replaced.
STOCK: Any = RKVServerArgs.__base__

THIRD_PARTY_DIR = PROJECT_ROOT / "tests" / "policies" / "third_party"

# A value other than the default for every setting.
VALUES: dict[str, Any] = {
    "policy": "rkv",
    "granularity": "request",
    "budget": 321,
    "buffer": 48,
    "window": 6,
    "prompt_budget": 0,
    "mix_lambda": 0.25,
    "kernel_size": 3,
    "similarity_threshold": -0.5,
    "stagger": True,
    "trace": True,
    "parameters": {"mix_lambda": 0.75},
}
FIELDS = {"policy": "kv_policy", "prompt_budget": "kv_prompt_budget", "parameters": "kv_policy_config"}
# Settings of every policy have a second spelling.
SHARED = ("granularity", "budget", "buffer", "window", "stagger", "trace")
FIELDS |= {setting: f"kv_{setting}" for setting in SHARED}
SECOND_FIELDS = {setting: f"rkv_{setting}" for setting in SHARED}


def field_of(setting: str) -> str:
    return FIELDS.get(setting, f"rkv_{setting}")


def flag_of(setting: str) -> str:
    return "--" + field_of(setting).replace("_", "-")


def text_of(value: Any) -> str:
    """Write a value as on the command line."""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def argv_of(setting: str, value: Any) -> list[str]:
    return [flag_of(setting)] if value is True else [flag_of(setting), text_of(value)]


# Tokens of a block follow from the page size.
BLOCK = {"block": 16}
ALL_FIELDS = {field_of(setting): value for setting, value in VALUES.items()}


@pytest.fixture(scope="module")
def help_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    child = Child(tmp_path_factory.mktemp("help"), ["-m", "sglang.launch_server", "--help"])
    yield child
    child.kill()


@pytest.fixture(scope="module")
def parser(help_process: Child) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang serve")
    RKVServerArgs.add_cli_args(parser)
    return parser


def parse(parser: argparse.ArgumentParser, *argv: str) -> Any:
    return RKVServerArgs.from_cli_args(parser.parse_args(["--model-path", "m", *argv]))


def test_every_setting_has_a_field_with_its_default() -> None:
    assert {*VALUES, *BLOCK} == {setting.name for setting in fields(PolicyConfig)}
    args = RKVServerArgs(model_path="m", kv_policy="rkv")
    assert config_from_args(args) == PolicyConfig(policy="rkv")
    assert policy_name(RKVServerArgs(model_path="m")) == "none"


def test_the_record_is_sglangs_own_with_fields_after_its_last() -> None:
    assert STOCK.__name__ == "ServerArgs" and STOCK is not RKVServerArgs
    assert RKVServerArgs.__struct_fields__ == (*STOCK.__struct_fields__, *ALL_FIELDS, *SECOND_FIELDS.values())


def test_flags_are_in_a_group_of_their_own(parser: argparse.ArgumentParser) -> None:
    (group,) = [group for group in parser._action_groups if group.title == GROUP_TITLE]
    in_group = {option for action in group._group_actions for option in action.option_strings}
    assert in_group == {flag_of(setting) for setting in VALUES} | {f"--rkv-{setting}" for setting in SHARED}
    stock = argparse.ArgumentParser()
    STOCK.add_cli_args(stock)
    assert set(parser._option_string_actions) == set(stock._option_string_actions) | in_group
    for setting in fields(PolicyConfig):
        if setting.name in BLOCK:
            continue
        help_text = parser._option_string_actions[flag_of(setting.name)].help
        default = {"policy": "none", "parameters": "{}"}.get(setting.name, setting.default)
        assert help_text is not None and help_text.endswith(f"Default: {default}.")
        assert ("Unit: tokens." in help_text) == (setting.type in (int, "int"))


@pytest.mark.parametrize(
    ("argv", "text", "is_refused"),
    [
        (("--config=FILE", "--kv-policy", "rkv"), "tp-size: 1", True),
        (("--config=FILE",), "kv-policy: rkv", True),
        (("--config=FILE",), "kv_policy: rkv", True),
        (("--conf", "FILE"), "kv-policy: rkv", True),
        # As SGLang itself has it.
        (("--config=FILE",), "tp-size: 1", False),
        (("--config=/none/here.yaml",), "", False),
    ],
)
def test_a_config_file_that_sglang_would_not_read_cannot_hide_a_policy(
    parser: argparse.ArgumentParser, tmp_path: Any, argv: tuple[str, ...], text: str, is_refused: bool
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    words = [word.replace("FILE", str(file)) for word in argv]
    options = parser.parse_args(["--model-path", "dummy", *words])
    if not is_refused:
        assert policy_name(RKVServerArgs.from_cli_args(options)) == "none"
        return
    with pytest.raises(
        RefusedError, match=re.escape(f"SGLang reads no file for --config={file}: write --config {file}")
    ):
        RKVServerArgs.from_cli_args(options)


@pytest.mark.parametrize("setting", VALUES)
def test_each_flag_reaches_its_own_setting(parser: argparse.ArgumentParser, setting: str) -> None:
    args = parse(parser, "--kv-policy", "rkv", *argv_of(setting, VALUES[setting]))
    expected = {"policy": "rkv", setting: VALUES[setting], **(BLOCK if setting == "granularity" else {})}
    assert config_from_args(args) == PolicyConfig(**expected)


def test_argv_config_file_and_keywords_agree(parser: argparse.ArgumentParser, tmp_path: Any) -> None:
    expected = PolicyConfig(**VALUES, **BLOCK)
    argv = [word for setting, value in VALUES.items() for word in argv_of(setting, value)]
    assert config_from_args(parse(parser, *argv)) == expected
    assert config_from_args(RKVServerArgs(model_path="m", **ALL_FIELDS)) == expected
    config = tmp_path / "server.yaml"
    config.write_text("".join(f"{flag_of(setting)[2:]}: {text_of(value)}\n" for setting, value in VALUES.items()))
    merged = ConfigArgumentMerger(parser).merge_config_with_args(["--config", str(config)])
    assert config_from_args(parse(parser, *merged)) == expected
    # What the command line says comes before what the file says, whatever the spelling.
    for flag in ("--kv-budget", "--rkv-budget"):
        merged = ConfigArgumentMerger(parser).merge_config_with_args(["--config", str(config), flag, "77"])
        assert config_from_args(parse(parser, *merged)).budget == 77


@pytest.mark.parametrize("setting", SHARED)
def test_both_spellings_reach_the_setting(parser: argparse.ArgumentParser, tmp_path: Any, setting: str) -> None:
    value, second = VALUES[setting], SECOND_FIELDS[setting]
    flag = "--" + second.replace("_", "-")
    expected = PolicyConfig(**{"policy": "rkv", setting: value, **(BLOCK if setting == "granularity" else {})})
    words = [flag] if value is True else [flag, str(value)]
    assert config_from_args(parse(parser, "--kv-policy", "rkv", *words)) == expected
    assert config_from_args(RKVServerArgs(model_path="m", kv_policy="rkv", **{second: value})) == expected
    both = {second: value, field_of(setting): value}
    assert config_from_args(RKVServerArgs(model_path="m", kv_policy="rkv", **both)) == expected
    config = tmp_path / "server.yaml"
    config.write_text(f"kv-policy: rkv\n{flag[2:]}: {text_of(value)}\n")
    merged = ConfigArgumentMerger(parser).merge_config_with_args(["--config", str(config)])
    assert config_from_args(parse(parser, *merged)) == expected


@pytest.mark.parametrize("setting", ["budget", "buffer", "window"])
def test_two_spellings_with_different_values_are_refused_in_one_line(setting: str) -> None:
    values = {field_of(setting): 21, SECOND_FIELDS[setting]: 20}
    with pytest.raises(ValueError) as caught:
        config_from_args(RKVServerArgs(model_path="m", kv_policy="rkv", **values))
    assert str(caught.value) == (
        f"--kv-{setting} 21 and --rkv-{setting} 20 are two spellings of one setting: set --kv-{setting} only"
    )
    assert config_from_args(RKVServerArgs(model_path="m", **values)) == PolicyConfig(policy="none")


@pytest.mark.parametrize("setting", ["buffer", "window"])
def test_a_policys_own_default_holds_where_the_user_names_none(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setattr(SnapKV, f"default_{setting}", 32, raising=False)
    assert config_from_args(RKVServerArgs(model_path="m", kv_policy="snapkv")) == PolicyConfig(
        **{"policy": "snapkv", setting: 32}
    )
    assert config_from_args(RKVServerArgs(model_path="m", kv_policy="h2o")) == PolicyConfig(policy="h2o")
    for name in (field_of(setting), SECOND_FIELDS[setting]):
        args = RKVServerArgs(model_path="m", kv_policy="snapkv", **{name: 5})
        assert config_from_args(args) == PolicyConfig(**{"policy": "snapkv", setting: 5})


BAD_PARAMETERS: list[Any] = [
    *(
        "",
        "{",
        "{'mix_lambda': 0.1}",
        '{"mix_lambda": }',
        '{"mix_lambda": NaN}',
        '{"mix_lambda": 1e999}',
        "mix_lambda=0.1",
    ),
    *("[1]", "1", "null", "no/such/file.json", "/", "a\0b", "~nobody-here/x", '{"x":' * 100_000),
    *({"budget": 64}, {"": 1}, {1: 1}, {"mix_lambda": "0.1"}, {"mix_lambda": True}, {"mix_lambda": None}),
    *({"mix_lambda": 2}, {"kernel_size": 7.0}, {"kernel_size": 4}, {"kernel_size": 0}, {"similarity_threshold": -2}),
    *(None, 5, ["mix_lambda"]),
]
BAD_VALUES: list[tuple[str, Any]] = [
    *[("policy", value) for value in ("snapkw", "RKV", "", None, 3)],
    *[("budget", value) for value in (1, 0, -5, 8, True, 100.5, "100")],
    *[("buffer", value) for value in (0, -1, False, 12.0, "x")],
    *[("window", value) for value in (0, -1, 4.0)],
    *[("kernel_size", value) for value in (0, -1, 4, 7.0, None)],
    *[("mix_lambda", value) for value in (-0.01, 1.01, math.nan, math.inf, "0.1", True, None)],
    *[("similarity_threshold", value) for value in (-1.01, 1.01, math.nan, -math.inf, "0.5", False, None)],
    *[("stagger", value) for value in (0, 1, "true", None)],
    *[("trace", value) for value in (0, 1, "true", None)],
    *[("parameters", value) for value in BAD_PARAMETERS],
]


@pytest.mark.parametrize(("setting", "value"), BAD_VALUES, ids=lambda value: repr(value)[:40])
def test_a_bad_value_is_refused_in_one_line_that_names_its_flag(setting: str, value: Any) -> None:
    args = RKVServerArgs(model_path="m", **{"kv_policy": "rkv", field_of(setting): value})
    with pytest.raises(ValueError) as caught:
        config_from_args(args)
    message = str(caught.value)
    assert message.startswith(flag_of(setting)) and "\n" not in message
    assert any(mend in message for mend in ("set --", "choose one of", "write for example", "its parameters are"))


def test_parameters_come_as_text_as_a_file_and_as_a_mapping(parser: argparse.ArgumentParser, tmp_path: Any) -> None:
    file = tmp_path / "parameters.json"
    file.write_text(' \n{"seed": 17}\n')
    expected = PolicyConfig(policy="random", parameters={"seed": 17})
    for text in ('{"seed": 17}', ' {"seed": 17} ', str(file)):
        assert config_from_args(parse(parser, "--kv-policy", "random", "--kv-policy-config", text)) == expected
    assert (
        config_from_args(RKVServerArgs(model_path="m", kv_policy="random", kv_policy_config={"seed": 17})) == expected
    )
    config = tmp_path / "server.yaml"
    config.write_text("kv-policy: random\nkv-policy-config:\n  seed: 17\n")
    merged = ConfigArgumentMerger(parser).merge_config_with_args(["--config", str(config)])
    assert config_from_args(parse(parser, *merged)) == expected


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe{}", b'"text"', b"nan"])
def test_a_file_without_parameters_is_refused_in_one_line(tmp_path: Any, content: bytes) -> None:
    file = tmp_path / "parameters.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        config_from_args(RKVServerArgs(model_path="m", kv_policy="h2o", kv_policy_config=str(file)))
    message = str(caught.value)
    assert (
        message.startswith(f"--kv-policy-config '{file}' ") and "\n" not in message and "write for example" in message
    )


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_is_a_choice(parser: argparse.ArgumentParser, name: str) -> None:
    args = parse(parser, "--kv-policy", name)
    assert (policy_name(args), config_from_args(args).policy) == (name, name)


def test_a_policy_of_another_package_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(THIRD_PARTY_DIR))
    parser = argparse.ArgumentParser()
    RKVServerArgs.add_cli_args(parser)
    args = parse(parser, "--kv-policy", "every_nth", "--kv-policy-config", '{"stride": 3}')
    assert config_from_args(args) == PolicyConfig(policy="every_nth", parameters={"stride": 3})
    with pytest.raises(
        ValueError, match=r"^--kv-policy-config does not fit --kv-policy every_nth: stride must be given"
    ):
        config_from_args(parse(parser, "--kv-policy", "every_nth"))


def test_a_window_as_large_as_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--kv-budget 64 must be greater than --kv-window 64"):
        config_from_args(RKVServerArgs(model_path="m", kv_policy="rkv", rkv_budget=64, rkv_window=64))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--kv-policy", "snapkw"),
        ("--kv-budget/--rkv-budget", "abc"),
        ("--kv-budget/--rkv-budget", "1.5"),
        ("--kv-buffer/--rkv-buffer", ""),
        ("--rkv-mix-lambda", "half"),
    ],
)
def test_what_cannot_be_parsed_ends_in_one_line_that_names_its_flag(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(parser, flag.split("/")[-1], value)
    assert caught.value.code == 2
    assert re.match(
        rf"sglang serve: error: argument {flag}: invalid .*{value}", capsys.readouterr().err.splitlines()[-1]
    )


def test_without_a_policy_no_other_setting_is_looked_at() -> None:
    unset = PolicyConfig(policy="none")
    for setting, value in BAD_VALUES:
        if setting != "policy":
            assert config_from_args(RKVServerArgs(model_path="m", **{field_of(setting): value})) == unset
    # Records that SGLang's own modules make know nothing of the policy.
    assert config_from_args(STOCK(model_path="m")) == unset


@pytest.fixture
def resolved() -> Any:
    args = RKVServerArgs(model_path="dummy", device="cpu", **ALL_FIELDS)
    args.resolve_once()
    return args


def test_a_record_survives_pickling_before_and_after_it_is_resolved(resolved: Any) -> None:
    for args in (RKVServerArgs(model_path="m", **ALL_FIELDS), resolved):
        copy = pickle.loads(pickle.dumps(args))
        assert type(copy) is RKVServerArgs
        assert config_from_args(copy) == config_from_args(resolving_view(copy)) == PolicyConfig(**VALUES, **BLOCK)
    with pytest.raises(AttributeError):
        pickle.loads(pickle.dumps(resolved)).kv_budget = 5


def test_a_view_sees_what_resolution_decided() -> None:
    args = RKVServerArgs(model_path="m", **ALL_FIELDS)
    declare_resolution(args, "test", kv_budget=99)
    assert config_from_args(resolving_view(args)).budget == 99


def test_the_published_arguments_have_the_settings(resolved: Any) -> None:
    before = runtime_context.snapshot_context()
    try:
        runtime_context.publish(resolved, role="tokenizer")
        assert config_from_args(runtime_context.get_memory()) == PolicyConfig(**VALUES, **BLOCK)
    finally:
        runtime_context.restore_context(before)
    assert {name: resolved.resolved_dict()[name] for name in ALL_FIELDS} == ALL_FIELDS


def test_launch_server_shows_the_group(help_process: Child) -> None:
    status, out, err = help_process.finish()
    assert status == 0, err
    group = out[out.index(f"{GROUP_TITLE}:") :]
    for setting in VALUES:
        assert len(re.findall(rf"^  {flag_of(setting)}[ ,]", group, re.MULTILINE)) == 1
