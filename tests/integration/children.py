"""Python processes that a test module starts all at once, so that their imports of SGLang overlap."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.harness.environment import PROJECT_ROOT, child_environment, has_gpu
from tests.support.harness.forked_python import ForkedPython

TIMEOUT_S = 300.0


class Child:
    """``python *argv`` in the project's folder, in a process group of its own; forked if not ``fresh``."""

    def __init__(
        self, folder: Path, argv: list[str], env: dict[str, str] | None = None, *, fresh: bool = False
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        self._process: subprocess.Popen[bytes] | ForkedPython
        # A forked process may not use a GPU that the one before the fork has looked for.
        if not (fresh or has_gpu()):
            self._process = ForkedPython(argv, child_environment(env=env), stdout=self._out, stderr=self._err)
            return
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
