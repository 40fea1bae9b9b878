"""The set-up names the true cause where it fails, before it blames a package index."""

import os
import sys
from pathlib import Path

import pytest

from devtools.env import setup
from devtools.env.setup import SetupError, check_cache

NOWHERE = "/dev/null/cache"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("UV_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def refusal() -> str:
    with pytest.raises(SetupError) as caught:
        check_cache()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_place_for_caches_is_made(home: Path) -> None:
    check_cache()
    assert os.listdir(home) == [".cache"] and os.listdir(home / ".cache") == []


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME", "UV_CACHE_DIR"])
def test_where_none_can_be_made_its_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, NOWHERE)
    assert refusal().startswith("/dev/null/cache") and "(Not a directory)" in refusal()
    assert f": set {variable} to a folder that is yours" in refusal()


def test_a_place_that_the_user_named_is_enough(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HOME", NOWHERE)
    monkeypatch.setenv("UV_CACHE_DIR", str(home / "uv"))
    check_cache()


def test_nothing_is_installed_without_one_and_nothing_is_asked_where_all_is_there(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("HOME", NOWHERE)
    done: list[str] = []
    monkeypatch.setattr(setup, "STAMP", home / "stamp")
    monkeypatch.setattr(setup, "MODEL_DIR", home)
    (home / "config.json").write_text("")
    monkeypatch.setattr(setup, "steps_for", lambda device, recorded: [("all", done.append, ["all"])])
    with pytest.raises(SetupError, match="set HOME"):
        setup.set_up("cpu")
    assert done == []
    (home / "stamp").write_text(setup.fingerprint("cpu"))
    monkeypatch.setattr(setup, "PYTHON", Path(sys.executable))
    setup.set_up("cpu")


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("error: Failed to initialize cache at `/x/uv`\n  Caused by: Permission denied (os error 13)", "make it yours"),
        ("OSError: [Errno 28] No space left on device", "free its disk"),
        ("error: Failed to fetch: `https://example.org/simple/`", "reachable?"),
    ],
)
def test_a_failed_command_is_blamed_on_what_it_says(capsys: pytest.CaptureFixture[str], said: str, advice: str) -> None:
    command = [sys.executable, "-c", f"print({said!r}); raise SystemExit(2)"]
    with pytest.raises(SetupError, match=f"status 2: .*{advice}"):
        setup.run(command, dict(os.environ), "is the package index reachable?")
    assert said in capsys.readouterr().err
