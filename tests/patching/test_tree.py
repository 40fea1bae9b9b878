"""The series goes into a tree wholly or not at all, comes out bit by bit, and takes the place of the hooks it names."""

import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rkv_sglang import cli
from rkv_sglang.integration.hooking.contract import Contract
from rkv_sglang.integration.hooks import native
from rkv_sglang.integration.hooks.table import HOOKS
from rkv_sglang.patching import tree as patching
from rkv_sglang.patching.folders import installed_folder
from rkv_sglang.patching.tree import PATCHES, look, read_series, releases

(RELEASE,) = releases()
SERIES = read_series(RELEASE)
FILES = sorted(PATCHES.glob(f"{RELEASE}/*.patch"))
MADE = frozenset().union(*(patch.new_files for patch in SERIES))
TOUCHED = sorted({path for patch in SERIES for path in patch.hunks} - MADE)
MOST_ADDED = 350


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Those files of the installed SGLang that the series touches, laid out as in its repository."""
    installed = installed_folder()
    assert installed is not None
    folder = tmp_path / "python" / "sglang"
    for name in ("__init__.py", "_version.py", *TOUCHED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(installed / name, folder / name)
    return folder


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode) for path in files}


def run(action: str, folder: Path, *flags: str) -> int:
    return cli.main(["patch", action, "--target", str(folder), *flags])


def test_it_goes_in_as_git_and_patch_would_put_it_in_and_comes_out_bit_by_bit(tree: Path, tmp_path: Path) -> None:
    before = content(tree)
    by_git, by_patch = tmp_path / "git", tmp_path / "patch"
    for copy, command in ((by_git, ["git", "apply", "--whitespace=error"]), (by_patch, ["patch", "-s", "-p1", "-i"])):
        shutil.copytree(tree.parents[1] / "python", copy / "python")
        env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        for file in FILES:
            subprocess.run([*command, str(file)], cwd=copy, env=env, check=True, capture_output=True)
    assert run("apply", tree) == 0
    assert content(tree) == content(by_git / "python" / "sglang") == content(by_patch / "python" / "sglang") != before
    assert run("revert", tree.parent) == 0
    assert content(tree) == before


def test_a_second_time_changes_nothing_and_a_part_is_what_it_says(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("apply", tree) == 0
    patched = content(tree)
    capsys.readouterr()
    assert run("apply", tree) == 0 and content(tree) == patched
    assert capsys.readouterr().out.startswith("0 files changed in ")
    assert run("revert", tree) == 0 and run("revert", tree) == 0
    assert run("apply", tree, "--only", "2-6") == 0
    assert look(tree, RELEASE).applied == tuple(patch.name for patch in SERIES[1:6])
    assert run("apply", tree, "--only", "1,7-9") == 0 and content(tree) == patched
    capsys.readouterr()
    assert run("check", tree) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"in   {patch.name[:4]} {patch.subject}" for patch in SERIES]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "4"], "0004-.* does not go in by itself: apply those before it"),
        (["--only", "0-2"], "--only 0-2 names patches that are not there: there are 1 to 9"),
        (["--only", "two"], "--only two is no list of numbers"),
    ],
)
def test_a_choice_that_cannot_be_is_one_line_and_nothing_is_written(
    tree: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    before = content(tree)
    assert run("apply", tree, *flags) == 1
    err = capsys.readouterr().err
    assert re.match(words, err) and err.count("\n") == 1 and content(tree) == before


def test_a_tree_that_is_not_the_release_s_own_is_refused(
    tree: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    choose = random.Random(seed)
    for action in ("apply", "revert"):
        path = choose.choice(TOUCHED)
        file = tree / path
        own = file.read_bytes()
        file.write_bytes(own + b"# of somebody's\n")
        before = content(tree)
        assert run(action, tree) == 1 and content(tree) == before
        assert capsys.readouterr().err.startswith(f"{path} is not that of SGLang {RELEASE}: ")
        file.write_bytes(own)
        assert run("apply", tree) == 0
    (tree / "_version.py").write_text("__version__ = version = '0.5.99'\n")
    assert run("apply", tree) == 1
    assert capsys.readouterr().err.startswith("there are no patches for SGLang 0.5.99: ")
    assert run("apply", tree / "srt") == 1


@pytest.mark.parametrize("what", ["file", "folder"])
def test_no_link_is_followed_out_of_the_tree(tree: Path, tmp_path: Path, what: str) -> None:
    inside = tree / ("srt/managers" if what == "folder" else "srt/managers/scheduler.py")
    outside = tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    elsewhere = content(outside) if what == "folder" else outside.read_bytes()
    assert run("apply", tree) == 1
    assert (content(outside) if what == "folder" else outside.read_bytes()) == elsewhere


def test_files_that_an_installer_shares_by_hard_links_stay_as_they_are(tree: Path, tmp_path: Path) -> None:
    file, shared = tree / "srt/managers/scheduler.py", tmp_path / "cache.py"
    os.link(file, shared)
    before = shared.read_bytes()
    assert run("apply", tree) == 0
    assert shared.read_bytes() == before != file.read_bytes()


def test_a_write_that_fails_anywhere_leaves_all_as_it_was(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = patching._put
    before = content(tree)
    for last in range(len(TOUCHED) + len(MADE)):
        calls = []

        def fail(file: Path, staged: str, last: int = last, calls: list[Path] = calls) -> None:
            calls.append(file)
            if len(calls) == last + 1:
                raise OSError("no space left")
            put(file, staged)

        monkeypatch.setattr(patching, "_put", fail)
        assert run("apply", tree) == 1 and len(calls) > last
        assert content(tree) == before


def test_what_a_crash_left_half_done_is_told_and_mended(tree: Path, tmp_path: Path) -> None:
    pristine = tmp_path / "pristine"
    shutil.copytree(tree, pristine)
    assert run("apply", tree) == 0
    patched = content(tree)
    for action, after in (("apply", patched), ("revert", content(pristine))):
        shutil.copy2(pristine / "srt/managers/scheduler.py", tree / "srt/managers/scheduler.py")
        assert run("check", tree) == 1 and look(tree, RELEASE).partly
        assert run(action, tree) == 0 and content(tree) == after


def test_the_series_is_small_and_each_patch_reads_like_one_for_sglang() -> None:
    added = 0
    for file in FILES:
        text = file.read_text()
        header, _, body = text.partition("\n---\n")
        assert re.search(r"^From: rkv_sglang maintainers\n? <maintainers@", header, re.MULTILINE), file.name
        assert header.count("\n\n") >= 1 and "R-KV" not in text and "rkv" not in body.partition("diff --git")[2]
        added += len(re.findall(r"^\+(?!\+\+ )", body, re.MULTILINE))
    assert 0 < added < MOST_ADDED


def test_the_contract_looks_through_the_patches(tree: Path) -> None:
    assert run("apply", tree) == 0
    contract = Contract.load()
    texts = contract.sources_in(tree).texts
    assert set(TOUCHED) <= texts.keys() and not MADE & texts.keys()
    changed = contract.changed_files(contract.sources_in(tree))
    assert not set(TOUCHED) & set(changed)


def test_where_the_host_calls_the_policy_there_is_no_hook_and_elsewhere_there_is(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.host_capabilities() == frozenset()
    assert native.without_native(HOOKS, frozenset()) == HOOKS
    assert run("apply", tree) == 0
    name = "sglang.srt.mem_cache.kv_policy"
    spec = importlib.util.spec_from_file_location(name, tree / "srt/mem_cache/kv_policy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    import sglang.srt.mem_cache

    monkeypatch.setattr(sglang.srt.mem_cache, "kv_policy", module, raising=False)
    capabilities = native.host_capabilities()
    assert capabilities == {hook.capability for hook in HOOKS} - {""}
    kept = native.without_native(HOOKS, capabilities)
    assert {hook.target for hook in HOOKS} - {hook.target for hook in kept} == {
        hook.target for hook in HOOKS if hook.capability
    }
    native.set_native_policy()
    policy = module.get_kv_policy()
    methods = {name for name in vars(module.KVPolicy) if not name.startswith("_")}
    assert methods == {name for name in vars(type(policy)) if not name.startswith("_")}
    monkeypatch.setattr(module, "KV_POLICY_API", 2)
    with pytest.raises(RuntimeError, match="has the KV policy interface 2"):
        native.host_capabilities()


def test_a_reader_that_has_enough_of_the_output_sees_no_traceback_and_the_patches_are_in(tree: Path) -> None:
    code = "import sys; from rkv_sglang.cli import main; sys.exit(main(sys.argv[1:]))"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code, "patch", "apply", "--target", str(tree)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    assert len(look(tree, RELEASE).applied) == len(SERIES)
