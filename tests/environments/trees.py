"""Copies of the installed SGLang with some of this package's patches in, each to be put in front by PYTHONPATH."""

import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rkv_sglang import cli
from rkv_sglang.patching.folders import PACKAGE, installed_folder


@dataclass(frozen=True)
class Environment:
    """One SGLang to test with.

    Attributes:
        name: How it is called in reports.
        patches: Which of the series are in, as ``rkv-sglang patch apply --only`` takes them; empty for none.
    """

    name: str
    patches: str


ENVIRONMENTS = (Environment("hooked", ""), Environment("patched", "1-9"), Environment("partly", "2-6"))


def make_tree(root: Path, environment: Environment) -> Path:
    """Lay out a copy of the installed SGLang; return the folder that goes onto PYTHONPATH.

    Files are hard links where the disk allows it: the command puts new files in their place and writes into none, and
    Python does the same with its bytecode.
    """
    installed = installed_folder()
    assert installed is not None, "SGLang is not installed"
    folder = root / environment.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(installed, folder / PACKAGE, symlinks=True, copy_function=_link_or_copy)
    if environment.patches:
        command = ["patch", "apply", "--target", str(folder), "--only", environment.patches]
        assert cli.main(command) == 0, f"the patches {environment.patches} do not go in"
    return folder


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def capabilities_in(tree: Path) -> frozenset[str]:
    """Return what the SGLang in a tree does by itself, as its own file says."""
    file = tree / PACKAGE / "srt" / "mem_cache" / "kv_policy.py"
    return frozenset(runpy.run_path(str(file))["CAPABILITIES"]) if file.exists() else frozenset()


def with_tree(tree: Path) -> dict[str, str]:
    """Return an environment in which Python finds the SGLang of a tree before the installed one."""
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), *([others] if others else [])])}


def run_module(tree: Path, arguments: list[str], env: dict[str, str] | None = None) -> None:
    """Run ``python -m`` with the SGLang of a tree.

    Raises:
        CalledProcessError: It failed; what it printed was shown.
    """
    subprocess.run([sys.executable, "-m", *arguments], env={**with_tree(tree), **(env or {})}, check=True)
