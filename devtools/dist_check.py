"""Serve one request from the built wheel, in an environment that has nothing of this checkout.

Usage: ``python -m devtools.dist_check [WHEEL]``; ``make dist-check`` builds the wheel first. The environment,
``.cache/dist-check``, is made anew by ``devtools/env/setup.py``: SGLang as it is released, and the wheel beside it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from devtools.launch import ServerError, exit_on_first_signal, launched_server

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
ENVIRONMENT = ROOT / ".cache" / "dist-check"
BUDGET, BUFFER, NUM_TOKENS = 32, 16, 100
PROMPT = list(range(1000, 1040))
# As many as fill the buffer again and again; the last token is never fed back.
COMPACTIONS = (NUM_TOKENS - 1 - BUDGET) // BUFFER
# Python neither looks into the folder that it is started in nor where this checkout is.
APART = {"PYTHONSAFEPATH": "1", "PYTHONPATH": ""}


def check(wheel: Path) -> str:
    """Install, start, ask; return one line on what was seen.

    Raises:
        CalledProcessError: The set-up or the doctor failed.
        ServerError: The server did, or did not compact.
    """
    started = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "devtools/env/setup.py"), "--wheel", str(wheel)], check=True)
    python = ENVIRONMENT / "bin" / "python"
    environment = {**os.environ, **APART}
    place = "import rkv_sglang; print(rkv_sglang.__file__)"
    found = subprocess.run([python, "-c", place], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    if not Path(found.strip()).is_relative_to(ENVIRONMENT):
        raise ServerError(f"it is {found.strip()} that would serve, which is not the wheel's")
    subprocess.run([ENVIRONMENT / "bin" / "rkv-sglang", "doctor"], env=environment, check=True)
    installed = time.monotonic()
    flags = ["--kv-policy", "rkv", "--kv-budget", str(BUDGET), "--kv-buffer", str(BUFFER)]
    log_path = ROOT / ".cache" / "logs" / "dist-check.log"
    with launched_server(str(MODEL), *flags, log_path=log_path, python=str(python), environment=APART) as server:
        (answer,) = server.generate([PROMPT], NUM_TOKENS)
    seen = answer["meta_info"].get("kv_compactions")
    if seen != COMPACTIONS:
        raise ServerError(f"{seen} compactions instead of {COMPACTIONS}; the server's log: {log_path}")
    seconds = f"{installed - started:.0f} s to install, {time.monotonic() - installed:.0f} s to serve"
    return f"{wheel.name}: {NUM_TOKENS} tokens and {seen} compactions ({seconds})"


def main(argv: list[str]) -> int:
    """Check a wheel, or the only one in ``dist/``; returns the exit status."""
    exit_on_first_signal()
    wheels = [Path(name) for name in argv] or sorted((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        print(f"{len(wheels)} wheels in dist/: name one, or build it with `make dist`", file=sys.stderr)
        return 1
    try:
        print(check(wheels[0]))
    except (ServerError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
