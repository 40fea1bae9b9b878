"""The patch of `sglang serve` does what it says, and the register of hooks and patches is current."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sglang

from devtools import hooks_page
from tests.integration.children import Child
from tests.support.harness.environment import PROJECT_ROOT

PATCHES = PROJECT_ROOT / "patches"
SERIES = sorted((PATCHES / sglang.__version__).glob("*.patch"))
SERVE_HELP = "from sglang.cli.main import main; main()"


def copy_of_sglang(root: Path) -> Path:
    """Lay the installed SGLang out as its repository does; only what the first patch touches is a real copy."""
    installed = Path(sglang.__file__).parent
    package = root / "python" / "sglang"
    package.mkdir(parents=True)
    for entry in installed.iterdir():
        if entry.name == "cli":
            shutil.copytree(entry, package / "cli", ignore=shutil.ignore_patterns("__pycache__"))
        elif entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    return package


def apply(root: Path, *options: str) -> None:
    # The copy may lie inside a repository, where git would look for the paths from that one's root.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    for patch in SERIES[:1]:
        command = ["git", "apply", "--whitespace=error", *options, str(patch)]
        subprocess.run(command, cwd=root, env=env, check=True, capture_output=True)


@pytest.fixture(scope="module")
def help_texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Child]]:
    folder = tmp_path_factory.mktemp("patches")
    children = {}
    for name in ("stock", "patched"):
        package = copy_of_sglang(folder / name)
        if name == "patched":
            apply(folder / name)
        env = {"PYTHONPATH": str(package.parent)}
        argv = ["-c", f"import sglang.cli.serve as s; print(s.__file__); {SERVE_HELP}"]
        children[name] = Child(folder / f"{name}-run", [*argv, "serve", "--model-type", "llm", "--help"], env)
    yield children
    for child in children.values():
        child.kill()


@pytest.mark.parametrize("name", ["stock", "patched"])
def test_serve_help_shows_plugin_flags_only_with_the_patch(help_texts: dict[str, Child], name: str) -> None:
    status, out, err = help_texts[name].finish()
    assert status == 0, err
    # It was the copy that ran.
    assert f"/{name}/python/sglang/cli/serve.py" in out.splitlines()[0]
    assert "--attention-backend" in out
    assert ("--kv-policy" in out) == (name == "patched")
    assert ("KV policy (rkv_sglang):" in out) == (name == "patched")


def test_the_register_is_current() -> None:
    assert hooks_page.main(["--check"]) == 0, "run: python -m devtools.hooks_page"


def test_the_register_names_every_hook_and_patch() -> None:
    from rkv_sglang.integration.hooks.table import HOOKS

    text = hooks_page.REGISTER.read_text()
    for hook in HOOKS:
        assert text.count(f"`{hook.target}`\n") == 1 and hook.why in text and hook.upstream in text
    for patch in SERIES:
        assert f"`{patch.relative_to(PATCHES)}`: {hooks_page.subject(patch)}" in text


def test_a_register_that_lacks_a_hook_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rkv_sglang.integration.hooks.table import HOOKS

    register = hooks_page.REGISTER
    stale = tmp_path / "hooks.md"
    stale.write_text(hooks_page.render(HOOKS[1:], SERIES))
    monkeypatch.setattr(hooks_page, "REGISTER", stale)
    assert hooks_page.main(["--check"]) == 1
    assert hooks_page.main([]) == 0 and stale.read_text() == register.read_text()
    assert hooks_page.main(["--check"]) == 0
