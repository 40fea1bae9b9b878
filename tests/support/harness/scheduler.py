"""Run the real scheduler of SGLang on a list of requests, in seconds instead of a server start's minute.

A helper process (``zygote.py``) imports SGLang once; each run forks from it. What runs is SGLang's own
``run_scheduler_process``: plugins, ServerArgs from command-line flags, model, pools, radix tree, event loop. Only HTTP
and tokenizing are left out: requests go in as token ids through the scheduler's own socket.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, ClassVar

import psutil

from tests.support.harness.environment import PROJECT_ROOT, child_environment, device_flags, with_defaults
from tests.support.harness.gate import Arrival, Control
from tests.support.harness.probe_log import ProbeLog

# Small enough to start fast, large enough for any tiny test; a test that needs pressure names its own.
# A row of the map as long as the models allow takes a seventh of every step, which checks all rows, and a start longer.
DEFAULT_FLAGS = [
    *("--max-total-tokens", "4096", "--max-running-requests", "16", "--random-seed", "1"),
    *("--context-length", "4096"),
]
_START_TIMEOUT_S = 240.0


class SchedulerFailed(RuntimeError):
    """The scheduler or its start failed.

    ``log`` is all that was printed, ``exit_code`` that of the process, ``outputs`` what had come back of each request;
    its ``finish_reason`` is None if it had not ended.
    """

    def __init__(self, message: str, log: str, exit_code: int | None, outputs: "list[Output]") -> None:
        super().__init__(f"{message} (exit code {exit_code}); the end of its log:\n{log[-6000:]}")
        self.log = log
        self.exit_code = exit_code
        self.outputs = outputs


class LauncherRefused(SchedulerFailed):
    """The launcher stopped before any scheduler was started: the flags were refused."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request.

    Attributes:
        input_ids: The prompt.
        sampling_params: As in SGLang's ``/generate``; greedy unless a temperature is given.
        return_logprob: Also return the log-probabilities of the output tokens.
        logprob_start_len: First prompt position whose log-probabilities are returned too; -1 for none.
        at_step: The pass of the event loop at which it arrives.
        when_idle: It arrives when everything before it in the list is done and the scheduler idle; ``at_step`` is
            ignored.
        abort_at_step: The pass at which it is aborted.
        abort_after_tokens: It is aborted once it has this many output tokens.
        extra: Further fields of SGLang's ``TokenizedGenerateReqInput``, such as ``priority`` or ``extra_key``.
    """

    input_ids: list[int]
    sampling_params: dict[str, Any]
    return_logprob: bool = False
    logprob_start_len: int = -1
    at_step: int = 0
    when_idle: bool = False
    abort_at_step: int | None = None
    abort_after_tokens: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Output:
    """What came back for one request; ``finish_reason`` as in SGLang (``{"type": "length", ..}``).

    ``info`` is what plugins added to its last output, by their names.
    """

    output_ids: list[int]
    finish_reason: dict[str, Any]
    cached_tokens: int
    prompt_tokens: int
    retractions: int
    output_logprobs: list[float]
    input_logprobs: list[float | None]
    info: dict[str, Any]


@dataclass(kw_only=True)
class RunResult:
    """What one run gave, outputs in the order of the requests.

    ``states`` are what schedulers answered to a ``GetInternalStateReq``, one of each that answers a server.
    """

    outputs: list[Output]
    states: list[dict[str, Any]]
    probe: ProbeLog
    log: str
    init_info: dict[str, Any]
    seconds: dict[str, float]

    @property
    def output_ids(self) -> list[list[int]]:
        return [output.output_ids for output in self.outputs]

    def assert_clean(self) -> None:
        self.probe.assert_clean(self.log)


def rid_of(index: int) -> str:
    """Return the id of the request at this place in the list. Equally long: SGLang aborts by prefix."""
    return f"r{index:05d}"


def run_scheduler(
    flags: list[str],
    requests: list[Request],
    *,
    controls: Sequence[Control] = (),
    env: dict[str, str] | None = None,
    timeout: float = 240.0,
    num_threads: int = 1,
    with_tokenizer: bool = False,
) -> RunResult:
    """Start a scheduler with these command-line flags, run the requests to their end, stop it.

    Args:
        flags: As for ``python -m sglang.launch_server``; the flags for a CPU and a small pool are added.
        requests: See ``Request``; may be empty (start and stop only).
        controls: Messages to the scheduler itself; of what it answers to them only its state is kept.
        env: Environment variables for this run, such as ``SGLANG_TEST_RETRACT``.
        timeout: Seconds for the whole run.
        num_threads: Threads of torch; one is fastest for a tiny model.
        with_tokenizer: Give the scheduler the model's, which stop strings, grammars and ``min_new_tokens`` need.

    Raises:
        LauncherRefused: The flags were refused before a scheduler was started.
        SchedulerFailed: The scheduler died; the message carries its traceback.
        TimeoutError: It took longer than ``timeout``; all its processes are gone.
    """
    folder = Path(tempfile.mkdtemp(prefix="rkv-run-"))
    probe_file = folder / "probe.jsonl"
    arrivals = [
        Arrival(
            rid=rid_of(index),
            at_step=request.at_step,
            when_idle=request.when_idle,
            abort_at_step=request.abort_at_step,
            abort_after_tokens=request.abort_after_tokens,
        )
        for index, request in enumerate(requests)
    ]
    defaults = [*DEFAULT_FLAGS, *device_flags()]
    job = {
        "flags": [*with_defaults(flags, defaults), *["--skip-tokenizer-init"] * (not with_tokenizer)],
        "env": child_environment(probe_file, env),
        "folder": str(folder),
        "num_threads": num_threads,
        "timeout": timeout,
        "requests": [(arrival.rid, request) for arrival, request in zip(arrivals, requests, strict=True)],
        "arrivals": arrivals,
        "controls": list(controls),
    }
    try:
        answer = _Zygote.get().run(job, timeout)
        log_path = folder / "log"
        log = log_path.read_text(errors="replace") if log_path.exists() else ""
        probe = ProbeLog.read(probe_file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if answer["status"] == "timeout":
        raise TimeoutError(f"the run took longer than {timeout} s ({answer['at']}); the end of its log:\n{log[-6000:]}")
    if answer["status"] != "ok":
        failure = LauncherRefused if answer["status"] == "refused" else SchedulerFailed
        outputs = [Output(**output) for _, output in sorted(answer.get("outputs", {}).items())]
        error = failure(answer["message"], log, answer.get("exit_code"), outputs)
        error.add_note(f"probe violations: {probe.violations[:5]}")
        error.probe = probe  # type: ignore[attr-defined]
        raise error
    outputs = [Output(**answer["outputs"][arrival.rid]) for arrival in arrivals]
    parts = {name: answer[name] for name in ("states", "init_info", "seconds")}
    return RunResult(outputs=outputs, probe=probe, log=log, **parts)


def run_job(job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Have a job of one's own run: a scheduler is started with its ``flags`` and fed by its ``driver``.

    Args:
        job: As ``run_scheduler`` makes it, without requests, and ``driver``, the name of a function (``module:name``):
            it gets the job and the rank, and registers hooks in the scheduler process. Or ``folder``, ``env`` and
            ``call``, the name of a function that gets the job, runs in a process with SGLang imported, and returns the
            answer.
        timeout: Seconds for all of it.

    Returns:
        ``status`` (``ok``, ``failed``, ``refused`` or ``timeout``) and what belongs to it.
    """
    empty = {"num_threads": 1, "timeout": timeout, "requests": [], "arrivals": [], "controls": []}
    return _Zygote.get().run({**empty, **job}, timeout)


def helper_address() -> str:
    """Return the address of the helper process, which is started if there is none, for ``use_helper``."""
    return _Zygote.get().address


def use_helper(address: str) -> None:
    """Have all runs of this process fork from another process's helper, for as long as that one lives."""
    _Zygote._instance = _Zygote(address)


class _Zygote:
    """The helper process with SGLang imported. It ends when who started it does: it watches its standard input."""

    _instance: "_Zygote | None" = None
    _imports = "sglang"
    # SGLang compiles the repetition penalty at its first use, which takes longer than most runs.
    _env: ClassVar[dict[str, str]] = {"TORCHDYNAMO_DISABLE": "1"}

    def __init__(self, address: str | None = None) -> None:
        """Start one, or speak to the one at ``address``, which somebody else has started."""
        self._process: subprocess.Popen[bytes] | None = None
        self.address = address or self._start()

    def _start(self) -> str:
        self._folder = tempfile.mkdtemp(prefix="rkv-zygote-")
        address = os.path.join(self._folder, "socket")
        self._log_path = Path(self._folder, "log")
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.harness.zygote", address, self._imports],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=PROJECT_ROOT,
                env=child_environment(env=self._env),
                # Ctrl-C reaches the test process, which then ends this one in order.
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not os.path.exists(address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"the scheduler helper did not start:\n{self._log_path.read_text()[-6000:]}")
            time.sleep(0.05)
        atexit.register(self.close)
        return address

    @classmethod
    def get(cls) -> "_Zygote":
        if cls._instance is None or cls._instance._has_ended:
            cls._instance = cls()
        return cls._instance

    @property
    def _has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def start(self, job: dict[str, Any]) -> tuple[int, Connection]:
        """Fork a process for a job; return its id, and where its answer will come from."""
        connection = Client(self.address, family="AF_UNIX")
        connection.send(job)
        return connection.recv(), connection

    def run(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        job_pid, connection = self.start(job)
        with connection:
            try:
                # The job ends itself at its timeout; this is for one that cannot.
                if not connection.poll(timeout + 30):
                    return {"status": "timeout", "at": "no answer"}
                return dict(connection.recv())
            except EOFError:
                return {"status": "failed", "message": "the job process died"}
            finally:
                _end_tree(job_pid)

    def close(self) -> None:
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            _end_tree(self._process.pid)
        shutil.rmtree(self._folder, ignore_errors=True)


class LibraryZygote(_Zygote):
    """Another one, which has imported what SGLang imports of others, and nothing of SGLang."""

    _instance = None
    _imports = "libraries"
    _env: ClassVar[dict[str, str]] = {}


def _end_tree(pid: int) -> None:
    """Kill a process of ours and all below it; waits until they are gone."""
    try:
        root = psutil.Process(pid)
        processes = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)
