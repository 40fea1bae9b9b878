"""A launch is judged as the real start judges it, but by all of its faults at once and without starting anything."""

import argparse
import io
import json
import os
import pkgutil
import shlex
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

from rkv_sglang import cli
from rkv_sglang.integration.doctor import launch as doctor
from rkv_sglang.integration.doctor.launch import check_command
from rkv_sglang.integration.doctor.report import Finding
from rkv_sglang.integration.hooks.table import HOOKS
from rkv_sglang.integration.startup.refusals import refuse, refuse_model
from rkv_sglang.integration.startup.refused_settings import RefusedSetting
from rkv_sglang.integration.startup.server_args import RKVServerArgs
from rkv_sglang.integration.startup.sliding import keep_in_one_pool
from tests.docs.pages import fences, page
from tests.integration.startup.refusal_kit import (
    REFUSED_BESIDE,
    REFUSED_CASES,
    REFUSED_MODELS,
    TINY,
    message_of,
    tiny_config_dir,
)
from tests.support.once import served_once

LAUNCH = "python -m sglang.launch_server --model-path meta/some-8b --kv-policy rkv"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config.json of a model that every policy serves."""
    folder = tmp_path_factory.mktemp("llama")
    return f"{tiny_config_dir(folder, transformers.LlamaConfig(**TINY), 'LlamaForCausalLM')}/config.json"


@pytest.fixture(scope="module", autouse=True)
def imports_are_over() -> None:
    """Python itself runs ldconfig to find a library that SGLang imports."""
    for hook in HOOKS:
        pkgutil.resolve_name(hook.target)


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch, imports_are_over: None) -> None:
    popen = subprocess.Popen

    def fail(command: Any, *args: Any, **kwargs: Any) -> Any:
        # SGLang asks them for a GPU's memory and for the CPU's cores.
        if command[0] in ("nvidia-smi", "lscpu"):
            return popen(command, *args, **kwargs)
        raise AssertionError(f"started a process or opened a port: {command}")

    monkeypatch.setattr(subprocess, "Popen", fail)
    monkeypatch.setattr(socket.socket, "bind", fail)


def judge(command: str, model_config: str | None = None) -> tuple[int, list[str]]:
    out = io.StringIO()
    before = dict(os.environ)
    status = check_command(command, model_config, out)
    assert dict(os.environ) == before
    lines = out.getvalue().splitlines()
    assert lines and len(lines) == len(set(lines)) and all(line.isprintable() for line in lines)
    return status, lines


def refused(command: str, model_config: str | None = None) -> list[str]:
    status, lines = judge(command, model_config)
    assert status == 1, lines
    return lines


def begins(lines: list[str], *beginnings: str) -> None:
    assert [line[: len(start)] for line, start in zip(lines, beginnings, strict=False)] == list(beginnings), lines
    assert len(lines) == len(beginnings), lines


@pytest.mark.parametrize(
    "command",
    [
        LAUNCH,
        f"SGLANG_LOG_MS=1 CUDA_VISIBLE_DEVICES='0,1' {LAUNCH} --tp-size 2",
        f"env HF_HOME=x exec /opt/venv/bin/python3.11 -u -X faulthandler {LAUNCH.removeprefix('python')}",
        "sglang serve meta/some-8b --kv-policy snapkv --kv-budget 64",
        "sglang serve --model-type llm --model-path=meta/some-8b --kv-policy=rkv",
        f"{LAUNCH} \\\n  --kv-budget 64 \\\n  --kv-policy-config '{{\"mix_lambda\": 0.2}}'",
        f'{LAUNCH} --served-model-name "a name; with > and |"',
        f"{LAUNCH} --device cpu --attention-backend torch_native",
    ],
)
def test_a_good_launch_would_start_and_what_is_unknown_is_said(command: str, llama: str) -> None:
    status, (line,) = judge(command, llama)
    assert status == 0 and line.startswith("would start with --kv-policy "), line
    assert "; not checked: the weights " in line


def test_without_a_gpu_its_defaults_are_not_checked(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device() -> str:
        raise RuntimeError("No accelerator")

    monkeypatch.setattr("rkv_sglang.integration.doctor.resolution.get_device", no_device)
    assert judge(LAUNCH, llama)[1][0].endswith("as there is none here")
    assert not judge(f"{LAUNCH} --device cuda", llama)[1][0].endswith("as there is none here")


@pytest.mark.parametrize("flags", ["", "--kv-budget 4 --enable-mixed-chunk", "--kv-policy none --pp-size 2"])
def test_a_launch_without_a_policy_is_stock_sglang(flags: str) -> None:
    status, lines = judge(f"python -m sglang.launch_server --model-path m {flags}")
    assert (status, lines) == (0, ["would be stock SGLang: the command sets no --kv-policy"])


def test_every_fault_of_a_launch_is_named_at_once(llama: str) -> None:
    lines = refused(
        f"SGLANG_USE_HND_KVCACHE=1 {LAUNCH} --kv-bugdet 512 --tp-size two --kv-budget 4 --rkv-budget 5 "
        "--rkv-kernel-size 4 --rkv-mix-lambda 2 --pp-size 2 --enable-mixed-chunk --no-such-flag 1 2 "
        "--served-model-name a:b --page-size",
        llama,
    )
    begins(
        lines,
        "argument --tp-size/--tensor-parallel-size: invalid int value: 'two'; mend it",
        "argument --page-size: expected one argument; mend it",
        "unrecognized arguments: --kv-bugdet 512; write --kv-budget",
        "unrecognized arguments: --no-such-flag 1 2; leave it out",
        "--kv-budget 5 must be greater than --kv-window 8, ",
        "--rkv-kernel-size 4 is even, ",
        "--rkv-mix-lambda 2.0 is not a number in [0, 1]",
        "--enable-mixed-chunk cannot be combined with --kv-policy rkv: ",
        "--pp-size 2 cannot be combined with --kv-policy rkv: ",
        "SGLANG_USE_HND_KVCACHE cannot be combined with --kv-policy rkv: ",
        "SGLang itself refuses the command (AssertionError: served_model_name cannot contain a colon",
    )


def test_flags_and_model_are_refused_together(tmp_path: Path) -> None:
    folder = tiny_config_dir(tmp_path, transformers.Gemma2Config(**TINY), "Gemma2ForCausalLM")
    lines = refused(f"{LAUNCH} --enable-lmcache", f"{folder}/config.json")
    assert lines[0].startswith("--enable-lmcache cannot be combined")
    assert lines[-1].startswith("--model-path meta/some-8b (Gemma2ForCausalLM) cannot be served with a --kv-policy: ")


def test_the_settings_of_a_config_file_count(tmp_path: Path, llama: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("kv-policy: rkv\nkv-window: 0\nenable-lmcache: true\npage-sice: 4\npp-size: 2\n")
    lines = refused(f"sglang serve meta/some-8b --config {shlex.quote(str(file))} --pp-size 1", llama)
    begins(
        lines,
        "unrecognized arguments: --page-sice 4; write --page-size",
        "--kv-window 0 is not an integer of at least 1",
        "--enable-lmcache cannot be combined",
    )
    file.write_text("kv-policy: rkv\nmodel-path: meta/some-8b\n")
    assert judge(f"python -m sglang.launch_server --config {file}", llama)[0] == 0
    begins(refused(f"{LAUNCH} --config={file}", llama), f"SGLang reads no file for --config={file}: write --config ")


def test_parameters_that_can_be_read_once_are_read_once(tmp_path: Path, llama: str) -> None:
    command = LAUNCH.replace("rkv", "random")
    for content, beginning in ((b'\xef\xbb\xbf{"seed": 17}', "would start with"), (b"{", "--kv-policy-config '")):
        with served_once(tmp_path / "fifo", content) as path:
            assert judge(f"{command} --kv-policy-config {path}", llama)[1][0].startswith(beginning)
        path.unlink()
    with served_once(tmp_path / "config.json", Path(llama).read_bytes()) as path:
        assert judge(command, str(path))[0] == 0


@pytest.mark.parametrize("text", [None, "- a\n- b\n", "kv-policy: [\n", "1: 2\n"])
def test_a_bad_config_file_is_one_line_beside_the_others(tmp_path: Path, llama: str, text: str | None) -> None:
    file = tmp_path / "server.yaml"
    if text is not None:
        file.write_text(text)
    begins(
        refused(f"{LAUNCH} --config {file} --pp-size 2", llama), "--config cannot be used (", "--pp-size 2 cannot be"
    )


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("", "--command runs nothing: give one launch"),
        ("SGLANG_X=1", "--command runs nothing: give one launch"),
        ("docker run sglang serve m", "--command starts no SGLang server with docker: give one launch"),
        ("python server.py --kv-policy rkv", "--command starts no SGLang server with python: "),
        ("python -m sglang.bench_serving", "--command starts no SGLang server with python: "),
        ("sglang generate", "--command starts no SGLang server with sglang: "),
        (f"{LAUNCH} > log 2>&1 &", "--command has the shell's > in it: "),
        (f"cd x && {LAUNCH}", "--command has the shell's && in it: "),
        (f"{LAUNCH} --served-model-name 'a", "--command cannot be read (no closing quotation): close its quotes"),
        (f"{LAUNCH} --kv-policy rvk", "argument --kv-policy: invalid choice: 'rvk'"),
        ("sglang serve --kv-policy rkv", "the following arguments are required: --model-path/--model; add it"),
        ("sglang serve --kv-policy rkv --model-path", "argument --model-path/--model: expected one argument; mend it"),
        (f"{LAUNCH} --kv-policy-config {{num_sinks:8}}", "--kv-policy-config is not JSON ("),
        (f"SGLANG_PLUGINS=other {LAUNCH}", "SGLANG_PLUGINS=other leaves this plugin out: add rkv_sglang"),
        (f"{LAUNCH} --kv 4", "ambiguous option: --kv could match "),
        ("sglang serve m --model-type diffusion --kv-policy rkv", "--model-type diffusion serves no language model"),
        ("sglang serve m --kv-policy rkv --model-type", "Error: --model-type requires a value. leave --model-type out"),
        (f"{LAUNCH} --help", "unrecognized arguments: --help; "),
    ],
)
def test_a_command_that_cannot_be_read_is_one_line(command: str, problem: str, llama: str) -> None:
    (line,) = refused(command, llama)
    assert line.startswith(problem), line


def test_a_model_that_is_not_here_asks_for_its_configuration(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "here"
    begins(
        refused(f"sglang serve {missing} --kv-policy rkv --pp-size 2"),
        "--pp-size 2 cannot be combined",
        f"--model-path {missing} has no usable configuration here (",
    )


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_bad_model_configuration_is_one_line(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    begins(refused(f"{LAUNCH} --pp-size 2", str(file)), "--pp-size 2 cannot", f"--model-config {file} ")
    if text == "[]":
        file.write_text(json.dumps({"model_type": "no-such-model"}))
        (line,) = refused(LAUNCH, str(file))
        assert "has no usable configuration here (" in line and tempfile.gettempdir() not in line
        assert line.endswith("): name another config.json than that of --model-config")


@pytest.mark.parametrize(("refusal", "value"), REFUSED_CASES, ids=lambda part: getattr(part, "setting", part))
def test_every_refused_setting_gets_the_line_of_the_real_start(
    monkeypatch: pytest.MonkeyPatch, llama: str, refusal: RefusedSetting, value: str
) -> None:
    is_flag = refusal.setting.startswith("--")
    words = [refusal.setting, *value.split()] if is_flag else []
    words += REFUSED_BESIDE.get(refusal.setting, "").split()
    variable = "" if is_flag else f"{refusal.setting}={value} "
    command = f"{variable}{LAUNCH} {shlex.join(words)}"
    lines = refused(command, llama)
    if not is_flag:
        monkeypatch.setenv(refusal.setting, value)
    parser = argparse.ArgumentParser()
    RKVServerArgs.add_cli_args(parser)
    options = parser.parse_args(["--model-path", "meta/some-8b", "--kv-policy", "rkv", *words])
    assert lines == [message_of(refuse, resolving_view(RKVServerArgs.from_cli_args(options)))]


@pytest.mark.parametrize(
    ("architecture", "config", "why"), REFUSED_MODELS, ids=[f"{row[0]}-{row[2]}" for row in REFUSED_MODELS]
)
def test_every_refused_model_gets_the_line_of_the_real_start(
    tmp_path: Path, architecture: str, config: Any, why: str
) -> None:
    folder = tiny_config_dir(tmp_path, config, architecture)
    args = RKVServerArgs(model_path=folder, kv_policy="rkv")
    keep_in_one_pool(args)
    message = message_of(refuse_model, model_config_of(args), args)
    lines = refused(f"sglang serve {folder} --kv-policy rkv")
    assert lines[0] == message and all("cannot be served with" in line or "SGLang itself" in line for line in lines)


def test_with_an_unsupported_sglang_nothing_else_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_sglang", lambda: Finding(subject="sglang", detail="x", problem="unsupported"))
    assert refused(f"{LAUNCH} --no-such-flag") == ["unsupported"]


def test_the_command_line_has_it(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--command", LAUNCH, "--model-config", llama]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("would start ") and captured.out.count("\n") == 1 and captured.err == ""


@pytest.mark.parametrize("argv", [["--model-config", "c.json"], ["--plan", "--command", LAUNCH]])
def test_flags_that_do_not_go_together_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("--") and captured.err.count("\n") == 1


def test_the_example_of_the_page_prints_what_the_page_shows(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = fences(page("docs/compatibility.md"))
    (place,) = [place for place, block in enumerate(blocks) if "doctor --model-config" in block]
    command, output = blocks[place : place + 2]
    argv = [llama if word == "config.json" else word for word in shlex.split(command)[1:]]
    assert cli.main(argv) == 1
    assert capsys.readouterr().out.split() == output.split()
