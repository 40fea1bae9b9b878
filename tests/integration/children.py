"""Python processes that a test module starts all at once, so that their imports of SGLang (15 s each) overlap."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.harness.environment import PROJECT_ROOT, child_environment

TIMEOUT_S = 300.0


class Child:
    """``python *argv`` in the project's folder, in a process group of its own."""

    def __init__(self, folder: Path, argv: list[str], env: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=PROJECT_ROOT,
                env=child_environment(env=env),
                start_new_session=True,
            )

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end; return exit status, standard output and standard error."""
        status = self._process.wait(TIMEOUT_S)
        return status, self._out.read_text(), self._err.read_text()

    def kill(self) -> None:
        """End it and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
