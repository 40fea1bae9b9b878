"""Start real SGLang servers, with or without a GPU, and end them with all their processes.

As a command (``python -m devtools.launch --model-path M --kv-policy rkv ...``) it becomes one server in the
foreground, with the flags a machine without a GPU needs put in front of the given ones.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rkv_sglang.client.http import open_url
from rkv_sglang.client.server import stream_events

# The default attention backend on x86 needs AMX kernels; without a GPU SGLang would size its pool by all free memory.
CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
    *("--max-total-tokens", "16384", "--max-running-requests", "64"),
)
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1"}
# Below the ports that Linux hands out by itself (from 32768), and below those SGLang draws from (22000 to 29999).
SERVER_PORTS = range(10000, 22000)


class ServerError(RuntimeError):
    """A server did not start or died; one line, with the place of its log."""


@functools.cache
def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def server_environment(model: str) -> dict[str, str]:
    """Return the environment of a server; a model in a folder needs no hub, and its own warm-up request no proxy."""
    offline = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
    return {**offline, **({} if has_gpu() else CPU_ENVIRONMENT), **os.environ, **past_proxies()}


def past_proxies() -> dict[str, str]:
    """Return the variables with which whatever a process uses for HTTP reaches this machine without a proxy."""
    given = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    # Each once, however often this process asks.
    direct = ",".join(dict.fromkeys(filter(None, [*given, "127.0.0.1", "localhost"])))
    return {"no_proxy": direct, "NO_PROXY": direct}


def importing_from(folder: Path) -> dict[str, str]:
    """Return the variable with which a server's processes also import from a folder, before all others named so."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def server_command(*flags: str, python: str = sys.executable) -> list[str]:
    """Return the command line of a server. Of a flag that is given twice SGLang takes the last, so ``flags`` win."""
    return [python, "-m", "sglang.launch_server", *(() if has_gpu() else CPU_FLAGS), *flags]


def free_port() -> int:
    """Return a TCP port that is free now, out of ``SERVER_PORTS``.

    A server binds it seconds later, so it is drawn where neither the kernel nor SGLang itself takes one meanwhile.

    Raises:
        ServerError: None is free.
    """
    for port in random.sample(SERVER_PORTS, len(SERVER_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError(f"no TCP port from {SERVER_PORTS[0]} to {SERVER_PORTS[-1]} is free on 127.0.0.1: end old servers")


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server: its address, its main process and the file with everything it printed."""

    url: str
    process: psutil.Popen
    log_path: Path

    def get_json(self, path: str, timeout_s: float = 60) -> Any:
        """Return the decoded answer of ``GET path``."""
        with open_url(self.url + path, timeout_s=timeout_s) as response:
            return json.load(response)

    def log_since(self, offset: int) -> str:
        """Return what the server printed from a byte on."""
        with self.log_path.open(errors="replace") as log:
            log.seek(offset)
            return log.read()

    def flush_cache(self) -> None:
        """Empty the prefix cache as soon as nothing runs, aborted requests included; within a minute."""
        open_url(self.url + "/flush_cache?timeout=60", method="POST", timeout_s=120).close()

    def _open_generate(self, payload: Mapping[str, Any], timeout_s: float) -> Any:
        return open_url(self.url + "/generate", body=json.dumps(payload).encode(), timeout_s=timeout_s)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        timeout_s: float = 600,
        custom_params: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Any]:
        """Send prompts of token ids in one call and return the answers: ``num_tokens`` each, greedy, no early end.

        Args:
            custom_params: Of each prompt, what it asks of the policy.

        Raises:
            ServerError: The server answered with an error, or with fewer tokens.
        """
        shared = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        sampling_params = [{**shared, "custom_params": dict(asked)} for asked in custom_params or ()] or shared
        try:
            with self._open_generate({"input_ids": prompts, "sampling_params": sampling_params}, timeout_s) as response:
                answers: list[Any] = json.load(response)
        except OSError as error:
            raise ServerError(f"the request failed ({error}); the server's log: {self.log_path}") from error
        lengths = {len(answer["output_ids"]) for answer in answers}
        if lengths != {num_tokens}:
            raise ServerError(f"answers of {sorted(lengths)} tokens instead of {num_tokens}; its log: {self.log_path}")
        return answers

    def stream_generate(self, payload: Mapping[str, Any], timeout_s: float = 600) -> Iterator[dict[str, Any]]:
        """Yield the events of a streaming ``POST /generate``; ``text`` and ``output_ids`` grow from event to event.

        Raises:
            ServerError: The server answered with an error or stopped answering.
        """
        try:
            with self._open_generate({**payload, "stream": True}, timeout_s) as response:
                yield from stream_events("the server", response)
        except ValueError as error:
            raise ServerError(f"{error}; its log: {self.log_path}") from error
        except OSError as error:
            raise ServerError(f"the request failed ({error}); the server's log: {self.log_path}") from error


def end_process_trees(*processes: psutil.Process, grace_s: float = 15) -> None:
    """End processes and their descendants, all at the same time: first ask, then kill what is left."""
    family: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [*process.children(recursive=True), process]
    for send in (psutil.Process.terminate, psutil.Process.kill):
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                send(member)
        _, family = psutil.wait_procs(family, timeout=grace_s)


def _wait_until_ready(server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = server.process.poll()
        if status is not None:
            lines = server.log_path.read_text(errors="replace").strip().splitlines() or ["(no output)"]
            raise ServerError(f"the server ended with status {status}: {lines[-1]} (its log: {server.log_path})")
        with contextlib.suppress(OSError), open_url(server.url + "/health", timeout_s=30):
            return
        time.sleep(0.5)
    raise ServerError(f"the server was not ready after {timeout_s:.0f} s; its log: {server.log_path}")


@contextlib.contextmanager
def launched_server(
    model: str,
    *flags: str,
    log_path: Path,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    startup_timeout_s: float = 600,
) -> Iterator[Server]:
    """Run a server on 127.0.0.1 and a free port for the length of a ``with`` block.

    Args:
        model: Folder or hub name of the model.
        flags: Further flags of the server, such as ``"--kv-policy", "rkv"``.
        log_path: File for what the server prints; its folder is made, its old content lost.
        python: Of another environment, whose SGLang is to serve.
        environment: Variables on top of this process's own.
        startup_timeout_s: How long it may take until ``GET /health`` succeeds.

    Raises:
        ServerError: It ended before it was ready, or was not ready in time.
    """
    port = free_port()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    address = ("--host", "127.0.0.1", "--port", str(port))
    command = server_command("--model-path", model, *address, *flags, python=python)
    with log_path.open("wb") as log:
        process = psutil.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**server_environment(model), **(environment or {})},
            # Ctrl-C must reach only this process, which then ends the server in order.
            start_new_session=True,
        )
    server = Server(url=f"http://127.0.0.1:{port}", process=process, log_path=log_path)
    try:
        _wait_until_ready(server, startup_timeout_s)
        yield server
    finally:
        end_process_trees(process)


def exit_on_first_signal() -> None:
    """Turn the first SIGTERM or Ctrl-C into ``SystemExit``, so that ``with`` blocks end their servers.

    Further ones are ignored: they would break off just that. ``timeout`` sends two at once, one of them to its group.
    """
    taken = (signal.SIGTERM, signal.SIGINT)

    def leave(number: int, frame: object) -> None:
        for each in taken:
            # Unlike SIG_IGN, a function is not passed on to processes that are started yet.
            signal.signal(each, lambda number, frame: None)
        sys.exit(128 + number)

    for each in taken:
        # A shell that starts a job in the background has it ignore Ctrl-C.
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, leave)


def main(arguments: Sequence[str]) -> None:
    """Replace this process by a server in the foreground."""
    model = next((after for flag, after in itertools.pairwise(arguments) if flag == "--model-path"), "")
    command = server_command("--host", "127.0.0.1", *arguments)
    print(" ".join(command[1:]), flush=True)
    os.execve(command[0], command, server_environment(model))


if __name__ == "__main__":
    main(sys.argv[1:])
