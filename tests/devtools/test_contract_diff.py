"""What a port has to read is all that differs of the contract, and nothing else."""

from pathlib import Path

import pytest

from devtools import contract_diff
from rkv_sglang.integration.hooking.contract import make_contract
from rkv_sglang.integration.hooking.sources import Sources

OURS = """
def same(a):
    return a

def other():
    return 1

class Owner:
    field = 1

    @property
    def grown(self):
        return 1
"""
OTHER = (
    OURS.replace("return 1\n\nclass", "return 2\n\nclass")
    .replace("    field = 1\n", "")
    .replace("        return 1\n", "        more = 1\n        return more\n")
)


def package(root: Path, text: str) -> Path:
    folder = root / "sglang"
    (folder / "srt").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "srt" / "part.py").write_text(text)
    return folder


def test_each_function_that_differs_is_shown_by_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, other = package(tmp_path / "ours", OURS), package(tmp_path / "other", OTHER)
    names = {f"sglang.srt.part.{name}": "a test" for name in ("same", "other", "Owner.field", "Owner.grown")}
    contract = make_contract("1.0", names, {}, [], Sources(ours))
    changes = contract_diff.differences(contract, ours, other)
    assert {name: [line for line in lines if line[0] in "+-"] for name, lines in changes.items()} == {
        "sglang.srt.part.other": ["-    return 1", "+    return 2"],
        "sglang.srt.part.Owner.field": [],
        "sglang.srt.part.Owner.grown": ["-        return 1", "+        more = 1", "+        return more"],
    }
    monkeypatch.setattr(contract_diff.Contract, "load", lambda: contract)
    monkeypatch.setattr(contract_diff, "installed_folder", lambda: ours)
    assert contract_diff.main([str(tmp_path / "other")]) == 0
    shown = capsys.readouterr().out
    assert "== sglang.srt.part.Owner.grown\n" in shown and "3 names and 5 lines differ between" in shown
    assert contract_diff.main([str(tmp_path)]) == 2 and contract_diff.main([]) == 2
