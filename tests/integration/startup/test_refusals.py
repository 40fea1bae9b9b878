"""Nothing that a policy cannot serve rightly gets past the launcher, and one line says what to do instead."""

import argparse
import os
import pickle
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from sglang.srt.arg_groups import resolution_hooks
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.arg_groups.parallel_hook import handle_deprecated_dp_attention

from rkv_sglang.integration.hooking.install import register_steps
from rkv_sglang.integration.hooks.steps import STEP_HOOKS
from rkv_sglang.integration.startup.errors import RefusedError, stop
from rkv_sglang.integration.startup.refusals import refuse
from rkv_sglang.integration.startup.refused_settings import ATTENTION_BACKENDS, REFUSED_SETTINGS, RefusedSetting
from rkv_sglang.integration.startup.server_args import RKVServerArgs, config_from_args
from tests.integration.children import Child
from tests.integration.startup.refusal_kit import (
    REFUSED_BESIDE,
    REFUSED_CASES,
    REFUSED_VALUES,
    TINY,
    message_of,
    tiny_config_dir,
)
from tests.support.once import served_once

ALLOWED = [
    "",
    *[f"--attention-backend {backend}" for backend in ATTENTION_BACKENDS],
    "--prefill-attention-backend fa3 --decode-attention-backend flashinfer",
    # Unused: prefill and decode each have their own.
    "--attention-backend aiter --prefill-attention-backend fa3 --decode-attention-backend triton",
    *[f"--kv-cache-dtype {dtype}" for dtype in ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")],
    "--device cuda --tp-size 8 --dp-size 2 --ep-size 2",
    "--tp-size 8 --attn-dp-size 4 --moe-a2a-backend deepep",
    "--device cpu --page-size 64 --chunked-prefill-size 256",
    "--enable-lora --enable-priority-scheduling --grammar-backend xgrammar",
    "--disable-radix-cache --disable-overlap-schedule",
    "--elastic-ep-backend none --kv-canary none --disaggregation-mode null",
    "--disaggregation-decode-retraction-backup none",
    "--enable-metrics --enable-return-hidden-states",
]


LAUNCH = "--device cpu --attention-backend torch_native --kv-policy rkv"


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    return tiny_config_dir(folder, transformers.LlamaConfig(**TINY), "LlamaForCausalLM")


ENGINE_SCRIPT = textwrap.dedent(
    """
    import sys
    import sglang

    if __name__ == "__main__":
        flags = {"model_path": sys.argv[1], "device": "cpu", "attention_backend": "torch_native", "kv_policy": "rkv"}
        for bad in ({"rkv_budget": 4}, {"rkv_window": "8"}, {"enable_mixed_chunk": True}):
            try:
                sglang.Engine(**flags, **bad)
            except ValueError as error:
                assert error.__cause__ is None and error.__context__ is None
                print(error)
        sglang.Engine(**flags, kv_canary="log")
    """
)


@pytest.fixture(scope="module", autouse=True)
def children(tmp_path_factory: pytest.TempPathFactory, llama_dir: str) -> Iterator[dict[str, Child]]:
    folder = tmp_path_factory.mktemp("children")
    (folder / "server.yaml").write_text("kv-policy: rkv\nrkv-budget: 256\nenable-lmcache: true\ndevice: cpu\n")
    (folder / "engine.py").write_text(ENGINE_SCRIPT)
    serve = "from sglang.cli.main import main; main()"
    argv = {
        "launch_server": ["-m", "sglang.launch_server", "--model-path", llama_dir, *LAUNCH.split(), "--pp-size", "2"],
        "serve": ["-c", serve, "serve", llama_dir, "--config", str(folder / "server.yaml")],
        "engine": [str(folder / "engine.py"), llama_dir],
    }
    started = {name: Child(folder / name, words) for name, words in argv.items()}
    yield started
    for child in started.values():
        child.kill()


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    RKVServerArgs.add_cli_args(parser)
    return parser


def parse(parser: argparse.ArgumentParser, line: str, policy: str = "rkv") -> Any:
    return RKVServerArgs.from_cli_args(parser.parse_args(["--model-path", "m", "--kv-policy", policy, *line.split()]))


def test_the_table_is_covered_and_names_every_setting_once() -> None:
    settings = [refusal.setting for refusal in REFUSED_SETTINGS]
    assert len(settings) == len(set(settings))
    assert set(REFUSED_VALUES) == set(settings)


@pytest.mark.parametrize(("refusal", "value"), REFUSED_CASES, ids=lambda part: getattr(part, "setting", part))
def test_every_row_is_refused_with_its_name_why_and_mend(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch, refusal: RefusedSetting, value: str
) -> None:
    is_flag = refusal.setting.startswith("--")
    if not is_flag:
        monkeypatch.setenv(refusal.setting, value)
    line = f"{refusal.setting} {value}" if is_flag else ""
    beside = REFUSED_BESIDE.get(refusal.setting, "")
    message = message_of(refuse, resolving_view(parse(parser, f"{line} {beside}")))
    shown = line.strip() or refusal.setting
    mend = refusal.mend or f"{'leave' if is_flag else 'unset'} {refusal.setting}{' out' if is_flag else ''}"
    assert message == f"{shown} cannot be combined with --kv-policy rkv: {refusal.why}; {mend}"
    refuse(resolving_view(parse(parser, line, policy="none")))


@pytest.mark.parametrize("line", ALLOWED)
def test_what_is_served_is_not_refused(parser: argparse.ArgumentParser, line: str) -> None:
    refuse(resolving_view(parse(parser, line)))


RECORDING = ("head", "request")
# Of each policy, with which granularities what only the recording of queries forbids is refused.
REFUSED_OF_RECORDING = {
    "rkv": RECORDING,
    "keydiff": RECORDING,
    "streaming_llm": ("head",),
    "random": ("head",),
    "random_attention": ("head",),
}


@pytest.mark.parametrize("refusal", REFUSED_SETTINGS, ids=lambda refusal: refusal.setting)
def test_what_records_no_query_is_refused_less(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch, refusal: RefusedSetting
) -> None:
    value = REFUSED_VALUES[refusal.setting][0]
    is_flag = refusal.setting.startswith("--")
    if not is_flag:
        monkeypatch.setenv(refusal.setting, value)
    line = f"{refusal.setting} {value}" if is_flag else ""
    for policy, granularities in REFUSED_OF_RECORDING.items():
        for granularity in RECORDING:
            beside = REFUSED_BESIDE.get(refusal.setting, "")
            words = f"--kv-granularity {granularity} {line} {beside}"
            view = resolving_view(parse(parser, words, policy=policy))
            if refusal.records_only and granularity not in granularities:
                refuse(view)
            else:
                assert message_of(refuse, view).startswith(refusal.setting)


def test_what_sglang_chose_by_itself_is_refused_too(parser: argparse.ArgumentParser) -> None:
    args = parse(parser, "")
    declare_resolution(args, "test", attention_backend="aiter")
    message = message_of(refuse, resolving_view(args))
    assert message.startswith("--attention-backend aiter ") and "choose flashinfer, trtllm_mha, fa3" in message


def test_the_old_spelling_of_data_parallel_attention_counts_too(parser: argparse.ArgumentParser) -> None:
    args = parse(parser, "--tp-size 2 --dp-size 2 --enable-dp-attention --moe-a2a-backend pplx")
    refuse(resolving_view(args))
    handle_deprecated_dp_attention(args)
    assert message_of(refuse, resolving_view(args)).startswith("--moe-a2a-backend pplx ")


def test_a_bad_value_comes_before_a_refused_flag(parser: argparse.ArgumentParser) -> None:
    message = message_of(refuse, parse(parser, "--pp-size 2 --rkv-kernel-size 4"))
    assert message.startswith("--rkv-kernel-size 4 ")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolution_hooks, "_HOOKS", {})
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    register_steps(STEP_HOOKS)


@pytest.mark.usefixtures("registered")
class TestResolution:
    def args(self, model_path: str, **settings: Any) -> Any:
        return RKVServerArgs(model_path=model_path, device="cpu", attention_backend="torch_native", **settings)

    def test_what_is_served_resolves(self, llama_dir: str) -> None:
        args = self.args(llama_dir, kv_policy="rkv", rkv_budget=64)
        args.resolve_once()
        view = resolving_view(args)
        assert (view.kv_budget, view.rkv_budget, view.kv_buffer, view.kv_window) == (64, 64, 128, 8)

    @pytest.mark.parametrize("model_path", ["no/such/model", "dummy"])
    def test_a_flag_is_refused_before_the_model_is_looked_for(self, model_path: str) -> None:
        args = self.args(model_path, kv_policy="rkv", enable_lmcache=True)
        assert message_of(args.resolve_once).startswith("--enable-lmcache ")

    def test_a_value_is_refused_before_the_model_is_looked_for(self) -> None:
        args = self.args("no/such/model", kv_policy="rkv", rkv_buffer=0)
        assert message_of(args.resolve_once).startswith("--kv-buffer 0 ")

    def test_a_default_is_refused_once_it_is_known(self, llama_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def choose(server_args: Any, previous: Any) -> None:
            previous(server_args)
            declare_resolution(server_args, "test", attention_backend="aiter")

        monkeypatch.setitem(resolution_hooks._HOOKS, "handle_other_validations", [choose])
        args = self.args(llama_dir, kv_policy="rkv")
        assert message_of(args.resolve_once).startswith("--attention-backend aiter ")

    def test_a_model_is_refused(self, tmp_path: Path) -> None:
        path = tiny_config_dir(tmp_path, transformers.Gemma2Config(**TINY), "Gemma2ForCausalLM")
        assert "latest 4096 tokens" in message_of(self.args(path, kv_policy="rkv").resolve_once)

    @pytest.mark.parametrize("mark", ["", "\ufeff"])
    def test_a_file_of_parameters_is_read_once_and_its_content_handed_on(self, tmp_path: Path, mark: str) -> None:
        with served_once(tmp_path / "fifo", f'{mark}{{"seed": 17}}\r\n'.encode()) as path:
            args = self.args("dummy", kv_policy="random", kv_policy_config=str(path))
            args.resolve_once()
        path.unlink()
        # As a scheduler gets them, and as it looks at them.
        views = [resolving_view(args), resolving_view(pickle.loads(pickle.dumps(args)))]
        assert [config_from_args(view).parameters for view in views] == [{"seed": 17}] * 2
        for view in views:
            refuse(view)
        assert args.resolved_dict()["kv_policy_config"] == {"seed": 17}

    def test_a_changed_file_changes_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "parameters.json"
        path.write_text('{"seed": 17}')
        args = self.args("dummy", kv_policy="random", kv_policy_config=str(path))
        args.resolve_once()
        path.write_text('{"seed": 18}')
        assert config_from_args(resolving_view(pickle.loads(pickle.dumps(args)))).parameters == {"seed": 17}

    @pytest.mark.parametrize("content", ["", "[1]", '{"seed": 1', '{"no_such": 1}'])
    def test_what_a_fifo_brings_is_refused_in_one_line(self, tmp_path: Path, content: str) -> None:
        with served_once(tmp_path / "fifo", content.encode()) as path:
            args = self.args("dummy", kv_policy="random", kv_policy_config=str(path))
            assert message_of(args.resolve_once).startswith("--kv-policy-config ")

    def test_without_a_policy_nothing_is_refused_or_changed(self, tmp_path: Path) -> None:
        path = tiny_config_dir(tmp_path, transformers.Gemma2Config(**TINY), "Gemma2ForCausalLM")
        before = sys.excepthook
        os.mkfifo(tmp_path / "unread")
        unread = str(tmp_path / "unread")
        self.args(path, rkv_buffer=0, enable_mixed_chunk=True, kv_policy_config=unread).resolve_once()
        assert sys.excepthook is before


def test_only_an_unsupported_setting_is_shown_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: others.append(error))
    for problem in ("first", "second"):
        with pytest.raises(RefusedError, match=problem) as caught:
            stop(problem)
        sys.excepthook(type(caught.value), caught.value, caught.tb)
        assert capsys.readouterr().err == f"{problem}\n"
    ordinary = ValueError("ordinary")
    sys.excepthook(ValueError, ordinary, None)
    assert others == [ordinary] and capsys.readouterr().err == ""


def test_launch_server_ends_in_one_line(children: dict[str, Child]) -> None:
    status, _, err = children["launch_server"].finish()
    assert status == 1
    assert err.splitlines()[-1].startswith("--pp-size 2 cannot be combined with --kv-policy rkv: ")
    assert "Traceback" not in err


def test_serve_with_a_config_file_ends_in_one_line(children: dict[str, Child]) -> None:
    status, _, err = children["serve"].finish()
    assert status == 1
    assert err.splitlines()[-1].startswith("--enable-lmcache cannot be combined with --kv-policy rkv: ")
    assert "Traceback" not in err


def test_engine_raises_a_value_error_and_uncaught_ends_in_one_line(children: dict[str, Child]) -> None:
    status, out, err = children["engine"].finish()
    assert status == 1
    lines = [line for line in out.splitlines() if line.startswith("--")]
    assert [line.split()[0] for line in lines] == ["--kv-budget", "--kv-window", "--enable-mixed-chunk"]
    assert err.splitlines()[-1].startswith("--kv-canary log cannot be combined with --kv-policy rkv: ")
    assert "Traceback" not in err
