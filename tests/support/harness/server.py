"""A real SGLang server as a context manager: started as a user would, ended by its own pid whatever happens."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import requests

from devtools.launch import free_port
from tests.support.harness.environment import (
    PROJECT_ROOT,
    child_environment,
    device_flags,
    end_with_parent,
    has_gpu,
    with_defaults,
)
from tests.support.harness.forked_python import ForkedPython
from tests.support.harness.probe_log import ProbeLog

# A scheduler with nothing to do looks for requests all the time, on a core that tests need.
_ALWAYS = ["--sleep-on-idle"]
# The length is as much as all models of the tests have; rows of the map that are longer make every step slower.
DEFAULT_FLAGS = [
    *("--max-total-tokens", "16384", "--max-running-requests", "64", "--random-seed", "1"),
    *("--context-length", "8192"),
]
# On a busy machine, raise it from outside.
START_TIMEOUT_S = float(os.environ.get("RKV_TEST_START_TIMEOUT_S", "300"))
_LAUNCH = [sys.executable, "-m", "sglang.launch_server"]


class Server:
    """``with Server(flags) as server:`` runs ``python -m sglang.launch_server`` on a free port of 127.0.0.1.

    Args:
        flags: Command-line flags, ``--model-path`` among them; those for a CPU and a small pool are added.
        env: Environment variables on top of ``child_environment``.
        command: Another launcher, such as ``["sglang", "serve"]``.
        with_probe: Whether the probe of the tests watches the scheduler.
        fresh: In interpreters of its own, which takes twenty seconds more; else see ``forked_python``.
    """

    def __init__(
        self,
        flags: list[str],
        *,
        env: dict[str, str] | None = None,
        command: list[str] | None = None,
        with_probe: bool = True,
        fresh: bool = False,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rkv-server-"))
        self._probe_file = self._folder / "probe.jsonl" if with_probe else None
        self.log_path = self._folder / "log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        defaults = [*DEFAULT_FLAGS, *device_flags(), "--host", "127.0.0.1", "--port", str(self.port)]
        self._command = [*(command or _LAUNCH), *with_defaults(flags, defaults), *_ALWAYS]
        # A forked process may not use a GPU that the one before the fork has looked for.
        self._is_fresh = fresh or has_gpu()
        self._env = child_environment(self._probe_file, env)
        self._env["TMPDIR"] = str(self._folder)
        self._process: subprocess.Popen[bytes] | ForkedPython | None = None

    def __enter__(self) -> "Server":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note("the end of the server's log:\n" + self.log()[-4000:])
        self.close()

    def start(self, timeout: float = START_TIMEOUT_S) -> None:
        """Start and wait until it answers.

        Raises:
            RuntimeError: It exited.
            TimeoutError: It does not answer in time. Both carry the end of the log; the process is gone.
        """
        process = self._spawn()
        deadline = time.monotonic() + timeout
        while not self._is_healthy():
            exit_code = process.poll()
            if exit_code is not None:
                raise RuntimeError(f"the server exited with {exit_code}:\n{self.log()[-6000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server was not ready after {timeout} s:\n{self.log()[-6000:]}")
            time.sleep(0.2)

    def start_and_expect_exit(self, timeout: float = START_TIMEOUT_S) -> tuple[int, str]:
        """Start a server that must refuse; return its exit code and all it printed.

        Raises:
            AssertionError: It serves, or still runs after ``timeout``.
        """
        process = self._spawn()
        deadline = time.monotonic() + timeout
        try:
            while process.poll() is None:
                assert not self._is_healthy(), f"the server started, it should have refused:\n{self.log()[-3000:]}"
                assert time.monotonic() < deadline, f"neither ready nor gone after {timeout} s:\n{self.log()[-3000:]}"
                time.sleep(0.3)
            return process.returncode, self.log()
        finally:
            self.close()

    def _spawn(self) -> "subprocess.Popen[bytes] | ForkedPython":
        assert self._process is None, "a Server starts once"
        atexit.register(self.close)
        if not self._is_fresh:
            assert self._command[0] == sys.executable
            self._process = ForkedPython(self._command[1:], self._env, stdout=self.log_path, stderr=self.log_path)
            return self._process
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=PROJECT_ROOT,
                env=self._env,
                # Ctrl-C goes to the test, which ends the server in order.
                start_new_session=True,
                # A worker of the test runner may be killed outright; its server must not outlive it.
                preexec_fn=lambda: end_with_parent(signal.SIGTERM),
            )
        return self._process

    def _is_healthy(self) -> bool:
        try:
            # /health_generate would send a request through the scheduler, which the probe would count.
            return (
                requests.get(f"{self.url}/model_info", timeout=2).status_code == 200 and "ready to roll" in self.log()
            )
        except requests.RequestException:
            return False

    def close(self) -> None:
        """End the server and all its children; keeps the log readable until the object goes. May be called twice."""
        process, self._process = self._process, None
        atexit.unregister(self.close)
        if process is not None:
            end_process_tree(process)
            self._final_log = self.log_path.read_text(errors="replace")
            if self._probe_file is not None:
                self._final_probe = self._read_probe()
        shutil.rmtree(self._folder, ignore_errors=True)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else getattr(self, "_final_log", "")

    def _read_probe(self) -> ProbeLog:
        assert self._probe_file is not None, "this server was started with with_probe=False"
        return ProbeLog.read(self._probe_file)

    def _last_probe_line(self) -> dict[str, Any]:
        """Return the newest whole line, without reading the rest: the file of a long run is large."""
        assert self._probe_file is not None, "this server was started with with_probe=False"
        if not self._probe_file.exists():
            return {}
        with self._probe_file.open("rb") as file:
            file.seek(max(0, self._probe_file.stat().st_size - 2**20))
            lines = file.read().rpartition(b"\n")[0].splitlines()
        return dict(json.loads(lines[-1])) if lines else {}

    def probe(self) -> ProbeLog:
        """Return what the probe saw up to now; also after the server was closed."""
        return self._read_probe() if self.log_path.exists() else self._final_probe

    def assert_clean(self) -> None:
        """Wait until idle, then assert: no violation, a whole pool, a clean log."""
        self.drain()
        self.probe().assert_clean(self.log())

    def generate(
        self,
        prompt: str | list[int],
        sampling_params: dict[str, Any] | None = None,
        *,
        timeout: float = 300.0,
        **fields: Any,
    ) -> Any:
        """POST to ``/generate``: text or token ids; greedy unless a temperature is given. Returns the answer's JSON,
        a list of them where ``n`` is above 1.

        Raises:
            requests.HTTPError: The status is not 200; the message carries the body.
        """
        response = self._post("/generate", self._payload(prompt, sampling_params, fields), timeout)
        return response.json()

    def generate_many(
        self, prompts: list[Any], sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None, **fields: Any
    ) -> list[dict[str, Any]]:
        """Send all prompts at once, one connection each; answers in the order of the prompts."""
        params = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        with ThreadPoolExecutor(max(1, len(prompts))) as pool:
            return list(
                pool.map(lambda pair: self.generate(pair[0], pair[1], **fields), zip(prompts, params, strict=True))
            )

    def stream(
        self,
        prompt: str | list[int],
        sampling_params: dict[str, Any] | None = None,
        *,
        timeout: float = 300.0,
        **fields: Any,
    ) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a streamed answer. Closing the iterator drops the connection: the request is aborted."""
        payload = {**self._payload(prompt, sampling_params, fields), "stream": True}
        with requests.post(f"{self.url}/generate", json=payload, timeout=timeout, stream=True) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield json.loads(line[len(b"data: ") :])

    @staticmethod
    def _payload(prompt: str | list[int], params: dict[str, Any] | None, fields: dict[str, Any]) -> dict[str, Any]:
        return {
            ("text" if isinstance(prompt, str) else "input_ids"): prompt,
            "sampling_params": {"temperature": 0.0, **(params or {})},
            **fields,
        }

    def _post(self, path: str, payload: dict[str, Any] | None, timeout: float) -> requests.Response:
        response = requests.post(f"{self.url}{path}", json=payload, timeout=timeout)
        if response.status_code != 200:
            raise requests.HTTPError(
                f"{path} answered {response.status_code}: {response.text[:2000]}", response=response
            )
        return response

    def abort(self, rid: str = "", *, abort_all: bool = False) -> None:
        """Abort the requests whose id starts with ``rid``, or all."""
        self._post("/abort_request", {"rid": rid, "abort_all": abort_all}, 30)

    def flush_cache(self) -> None:
        """Empty the radix cache; the server must be idle."""
        self._post("/flush_cache", None, 60)

    def server_info(self) -> dict[str, Any]:
        response = requests.get(f"{self.url}/server_info", timeout=30)
        response.raise_for_status()
        return dict(response.json())

    def drain(self, timeout: float = 120.0) -> None:
        """Wait until the scheduler is idle and its idle checks have run.

        Raises:
            TimeoutError: It is still busy, or dead.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                raise TimeoutError(f"the server is dead:\n{self.log()[-6000:]}")
            if self._last_probe_line().get("event") not in ("step", "compaction", "fault"):
                return
            time.sleep(0.1)
        raise TimeoutError(f"the scheduler is not idle after {timeout} s:\n{self.log()[-6000:]}")


def end_process_tree(process: "subprocess.Popen[bytes] | ForkedPython", patience_s: float = 10.0) -> None:
    """Kill a process and every child it had; waits until all are gone. Asked, SGLang would end at its next look in 5 s.

    What ``multiprocessing`` left on the disk is removed by the one process that ends by itself when the others have.
    """
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    # The session was started for this server alone, so whatever is left in it is its own.
    for child in [*children, *_session_members(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "multiprocessing.resource_tracker" not in " ".join(child.cmdline()):
                child.kill()
    process.wait(patience_s)
    psutil.wait_procs(children, timeout=patience_s)


def _session_members(session: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session:
                members.append(process)
    return members
