"""``python *argv`` in a process forked from one that has imported what SGLang imports of others, but nothing of SGLang.

Six of the eight seconds that an import of SGLang takes are other packages'. All else is as in a new interpreter: its
arguments, environment and paths, its exit, and the processes that ``multiprocessing`` spawns, which come from a process
that was forked before the program began.
"""

import atexit
import contextlib
import multiprocessing.forkserver
import multiprocessing.popen_forkserver
import multiprocessing.popen_spawn_posix
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from tests.support.harness.environment import PROJECT_ROOT, end_with_parent
from tests.support.harness.scheduler import LibraryZygote

_PYTHONPATH = "PYTHONPATH"
# Of the process that all are forked from.
_INHERITED_PATH = os.environ.get(_PYTHONPATH, "").split(os.pathsep)


class ForkedPython:
    """The side of who starts it: what is used of ``subprocess.Popen``, in the project's folder."""

    def __init__(self, argv: list[str], env: dict[str, str], *, stdout: Path, stderr: Path) -> None:
        job = {"argv": argv, "env": env, "folder": str(stdout.parent), "stdout": str(stdout), "stderr": str(stderr)}
        _, self._connection = LibraryZygote.get().start(job)
        self.pid: int = self._connection.recv()
        self.returncode: int | None = None

    def poll(self, timeout: float | None = 0.0) -> int | None:
        if self.returncode is None and self._connection.poll(timeout):
            try:
                self.returncode = self._connection.recv()
            except EOFError:
                self.returncode = -signal.SIGKILL
            self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        code = self.poll(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a forked Python", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(job: dict[str, Any], connection: Connection) -> None:
    """The other side: fork the process, send its id, then its exit code."""
    pid = os.fork()
    if pid == 0:
        connection.close()
        _be_python(job)
    connection.send(pid)
    connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _be_python(job: dict[str, Any]) -> NoReturn:
    os.setsid()
    end_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(job["env"])
    tempfile.tempdir = None
    os.chdir(PROJECT_ROOT)
    _fork_instead_of_spawning()
    try:
        _run_main(job["argv"])
        code = 0
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _run_main(argv: list[str]) -> None:
    """Do what the interpreter does with its arguments: ``-m module``, ``-c code``, or the path of a script."""
    kind, *rest = argv
    given = [path for path in os.environ.get(_PYTHONPATH, "").split(os.pathsep) if path]
    first = {"-m": str(PROJECT_ROOT), "-c": ""}.get(kind, str(Path(kind).parent))
    others = [path for path in sys.path[1:] if path not in _INHERITED_PATH]
    sys.path[:] = [*[first] * ("PYTHONSAFEPATH" not in os.environ), *given, *others]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = argv
        runpy.run_path(kind, run_name="__main__")


def _fork_instead_of_spawning() -> None:
    """Start a fork server of ``multiprocessing``, and let every process that is to be spawned come from it."""
    server = multiprocessing.forkserver._forkserver
    # It would start a server of its own in a grandchild.
    server.ensure_running = multiprocessing.resource_tracker.ensure_running  # type: ignore[method-assign]
    _carry_the_environment()
    multiprocessing.popen_spawn_posix.Popen = multiprocessing.popen_forkserver.Popen  # type: ignore[misc,assignment]
    listener = socket.socket(socket.AF_UNIX)
    starter = os.getpid()
    # A name that leaves no file.
    listener.bind(f"\0rkv-forks-{starter}")
    listener.listen()
    alive_reader, alive_writer = os.pipe()
    if os.fork() == 0:
        os.close(alive_writer)
        _be_fork_server(listener.detach(), alive_reader, starter)
    os.close(alive_reader)
    server._forkserver_address, server._forkserver_alive_fd = listener.getsockname(), alive_writer  # type: ignore[attr-defined]
    listener.close()


def _be_fork_server(listener: int, alive_reader: int, starter: int) -> NoReturn:
    end_with_parent(signal.SIGKILL)
    # A scheduler that fails tells its parent, which is this process.
    signal.signal(signal.SIGQUIT, lambda number, frame: os.kill(starter, signal.SIGQUIT))
    os.register_at_fork(after_in_child=_begin_anew)
    try:
        multiprocessing.forkserver.main(listener, alive_reader, [])
    finally:
        os._exit(0)


def _begin_anew() -> None:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL)


def _carry_the_environment() -> None:
    """Have a process that is started get the environment of the one that starts it, as if it were spawned."""
    spawn = multiprocessing.spawn
    data_for, prepare = spawn.get_preparation_data, spawn.prepare

    def data_with_environment(name: str) -> dict[str, Any]:
        return {**data_for(name), "environment": dict(os.environ)}

    def prepare_in_environment(data: dict[str, Any]) -> None:
        os.environ.clear()
        os.environ.update(data.pop("environment"))
        prepare(data)

    spawn.get_preparation_data = data_with_environment
    spawn.prepare = prepare_in_environment
