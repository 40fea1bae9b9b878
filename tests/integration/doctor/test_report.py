"""The doctor: silent where all is well, and otherwise the last line says what is wrong and how to mend it."""

import io
import os
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from rkv_sglang import __version__, cli
from rkv_sglang.integration.doctor import report as doctor
from rkv_sglang.integration.doctor.launch import check_command
from rkv_sglang.integration.doctor.report import Finding, check_device, check_plugin, check_sglang, report
from rkv_sglang.integration.hooking import releases
from rkv_sglang.integration.hooking.contract import Contract
from rkv_sglang.integration.hooking.contract import Finding as Difference
from rkv_sglang.integration.hooks.table import HOOKS
from rkv_sglang.integration.startup.refused_settings import REFUSED_SETTINGS
from rkv_sglang.policies import policy_names
from tests.integration.children import Child

CONTRACT = Contract.load()
PLUGIN = EntryPoint("rkv_sglang", "rkv_sglang.integration.plugin:register", doctor.PLUGIN_GROUP)
OTHER = EntryPoint("other", "no.such.module:register", doctor.PLUGIN_GROUP)


# SGLang and torch set some of these for their child processes, of which this may be one.
def _caches() -> list[str]:
    return [name for name in os.environ if name.endswith("_CACHE_DIR")]


def test_this_installation_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0, lines
    assert lines[-1].startswith("ready:") and all(line.startswith("ok ") for line in lines[:-1])
    subjects = [line.split()[1] for line in lines[:-1]]
    assert subjects == [
        "rkv_sglang",
        "python",
        "sglang",
        "torch",
        "triton",
        "flashinfer",
        "device",
        "plugin",
        "contract",
        "hooks",
    ]
    assert __version__ in lines[0]


def test_without_a_writable_home_the_last_line_names_it_and_nothing_traces_back(tmp_path: Path) -> None:
    env = {"HOME": "/dev/null", **dict.fromkeys(_caches(), "")}
    child = Child(tmp_path, ["-m", "rkv_sglang.cli", "doctor"], env, fresh=True)
    status, out, err = child.finish()
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert "'/dev/null/.cache'" in lines[-1] and lines[-1].endswith(": set HOME to a folder that you may write to")
    assert [line for line in lines[:-1] if not line.startswith(("ok  ", "FAIL"))] == []


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (NotADirectoryError(20, "Not a directory", os.path.expanduser("~/.cache/x")), "set HOME to a folder that you"),
        (PermissionError(13, "Permission denied", "/var/x"), "make that a place that you may write to"),
        (ModuleNotFoundError("No module named 'sglang.srt.x'"), "install sglang=="),
        (OSError("libcudart.so.12: cannot open shared object file"), "install sglang=="),
        (KeyError("sglang"), "install sglang=="),
        (RuntimeError("two\nlines"), "install sglang=="),
    ],
)
def test_whatever_an_import_raises_is_one_line_with_its_mend(
    monkeypatch: pytest.MonkeyPatch, error: Exception, mend: str
) -> None:
    class Broken:
        def find_spec(self, name: str, *args: Any) -> None:
            if name in ("rkv_sglang.integration.hooks.table", "rkv_sglang.integration.doctor.arguments"):
                raise error

    for module in ("rkv_sglang.integration.hooks.table", "rkv_sglang.integration.doctor.arguments"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    outputs = [io.StringIO(), io.StringIO()]
    assert doctor.diagnose(outputs[0]) == 1
    assert check_command("sglang serve m --kv-policy rkv", out=outputs[1]) == 1
    problems = [output.getvalue().splitlines()[-1] for output in outputs]
    assert problems[0] == problems[1] and f": {mend}" in problems[0]
    assert outputs[1].getvalue().count("\n") == 1


def test_details_name_every_hook_every_policy_and_every_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--details"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {hook.kind:<8}{hook.target.removeprefix('sglang.')}\n" in shown for hook in HOOKS)
    assert all(f"  {refusal.setting}: {refusal.why}" in shown for refusal in REFUSED_SETTINGS)
    assert ", ".join(policy_names()) in shown


def test_the_first_problem_is_the_last_line() -> None:
    findings = [
        Finding(subject="a", detail="fine"),
        Finding(subject="b", detail="bad", problem="b is bad: mend b"),
        Finding(subject="c", detail="bad", problem="c is bad: mend c"),
    ]
    out = io.StringIO()
    assert report(findings, out) == 1
    lines = out.getvalue().splitlines()
    assert [line[:4] for line in lines[:3]] == ["ok  ", "FAIL", "FAIL"]
    assert lines[3:] == ["b is bad: mend b"]


def test_a_missing_or_unknown_sglang_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", missing)
    assert "pip install sglang==" in (check_sglang().problem or "")
    assert "pip install triton" in (doctor.check_package("triton").problem or "")
    monkeypatch.setattr(doctor, "version", lambda package: "0.9.9")
    monkeypatch.setattr(releases, "version", lambda package: "0.9.9")
    finding = check_sglang()
    assert (finding.problem or "").startswith("SGLang 0.9.9 was not tested") and "0.9.9" in finding.detail


def test_with_another_sglang_the_contract_is_looked_at_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (
        Difference("missing", "sglang.a.b", "used by c", breaks=True),
        Difference("changed", "sglang.a.f", "its body is not that of 0.5.23", breaks=False),
    )
    for module in (doctor, releases):
        monkeypatch.setattr(module, "version", lambda package: "0.9.9")
        monkeypatch.setattr(module, "findings_in", lambda folder: found)
    out = io.StringIO()
    assert doctor.diagnose(out) == 1
    *lines, last = out.getvalue().splitlines()
    total = len(CONTRACT.names) + len(CONTRACT.parameters)
    assert lines[-1].startswith(f"FAIL contract   {total - 1} of {total} names and signatures ")
    assert f" {len(CONTRACT.functions) - 1} of {len(CONTRACT.functions)} functions as in " in lines[-1]
    assert last.startswith("SGLang 0.9.9 lacks 1 thing ") and "missing sglang.a.b" in last


@pytest.mark.parametrize(
    ("plugins", "allowed", "problem"),
    [
        ([PLUGIN], "", None),
        ([OTHER, PLUGIN], "other, rkv_sglang", None),
        ([], "", "no entry point rkv_sglang"),
        ([OTHER], "", "no entry point rkv_sglang"),
        ([PLUGIN], "other", "SGLANG_PLUGINS=other leaves this plugin out: add rkv_sglang to it or unset it"),
        ([EntryPoint("rkv_sglang", "no.such.module:register", "g")], "", "ModuleNotFoundError"),
        ([EntryPoint("rkv_sglang", "rkv_sglang:no_such_name", "g")], "", "AttributeError"),
    ],
)
def test_the_plugin_must_be_found_allowed_and_loadable(plugins: Any, allowed: str, problem: str | None) -> None:
    finding = check_plugin(plugins, allowed)
    if problem is None:
        assert finding.problem is None
    else:
        assert finding.problem is not None and problem in finding.problem and "\n" not in finding.problem


def test_the_device_is_named() -> None:
    assert check_device().detail.startswith(("CPU", "CUDA"))


@pytest.mark.parametrize("argv", [[], ["surgeon"], ["doctor", "--loud"]])
def test_bad_usage_exits_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and "rkv-sglang" in capsys.readouterr().err
