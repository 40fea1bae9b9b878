"""One run, in a process forked from the zygote: plays the launcher, the tokenizer and the detokenizer of a server."""

import itertools
import multiprocessing
import os
import pickle
import pkgutil
import select
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import zmq

from tests.support.harness import forked_python
from tests.support.harness.environment import end_with_parent
from tests.support.harness.messages import empty_output, generate_message, take
from tests.support.harness.processes import input_of, launcher_process, num_dp_ranks_of, scheduler_process

# SGLang reads these when it is imported, that is before the run's environment is known.
_READ_AT_IMPORT = {
    "SGLANG_TEST_RETRACT": ("sglang.srt.managers.scheduler", "TEST_RETRACT"),
    "SGLANG_TEST_RETRACT_INTERVAL": ("sglang.srt.managers.scheduler", "TEST_RETRACT_INTERVAL"),
    "SGLANG_TEST_RETRACT_NO_PREFILL_BS": ("sglang.srt.managers.scheduler", "TEST_RETRACT_NO_PREFILL_BS"),
}


def main(connection: Connection) -> None:
    """Receive a job, run it, send the answer. Never returns."""
    end_with_parent(signal.SIGKILL)
    # A scheduler that fails signals its parent; that it died is noticed anyway.
    signal.signal(signal.SIGQUIT, lambda signum, frame: None)
    answer: dict[str, Any]
    try:
        job = connection.recv()
        connection.send(os.getpid())
        if "argv" in job:
            forked_python.run(job, connection)
            os._exit(0)
        _enter(job)
        # A job may be a function, which runs here, or a scheduler that is started and spoken to.
        answer = pkgutil.resolve_name(job["call"])(job) if "call" in job else _Run(job, connection).answer()
    except BaseException:
        answer = {"status": "failed", "message": "the harness itself failed: " + traceback.format_exc()}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        connection.send(answer)
    finally:
        os._exit(0)


def _enter(job: dict[str, Any]) -> None:
    log = os.open(os.path.join(job["folder"], "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(job["env"])
    # Sockets and other left-overs go where the run's folder is removed.
    os.environ["TMPDIR"] = tempfile.tempdir = job["folder"]
    _set_what_was_read_at_import()


def _set_what_was_read_at_import() -> None:
    from sglang.srt.environ import envs

    for name, (module, attribute) in _READ_AT_IMPORT.items():
        setattr(sys.modules[module], attribute, getattr(envs, name).get())


class _Timeout(Exception):
    pass


class _Died(Exception):
    pass


class _Run:
    def __init__(self, job: dict[str, Any], connection: Connection) -> None:
        self._job = job
        self._connection = connection
        self._started = time.monotonic()
        self._deadline = self._started + job["timeout"]
        self._schedulers: list[Any] = []
        self._stage = "launcher"
        self._seconds: dict[str, float] = {}
        self._outputs: dict[str, dict[str, Any]] = {}
        self._states: list[dict[str, Any]] = []

    def answer(self) -> dict[str, Any]:
        try:
            return self._run()
        except _Timeout:
            return {"status": "timeout", "at": self._stage}
        except _Died as error:
            code = self._exit_code()
            return {"status": "failed", "message": str(error), "exit_code": code, "outputs": self._outputs}
        finally:
            for process in self._schedulers:
                process.kill()
                process.join()

    def _exit_code(self) -> int | None:
        codes = []
        for process in self._schedulers:
            process.join(5)
            codes.append(process.exitcode)
        return next((code for code in codes if code), None)

    def _next_stage(self, name: str) -> None:
        self._seconds[self._stage] = round(time.monotonic() - self._started - sum(self._seconds.values()), 3)
        self._stage = name

    def _run(self) -> dict[str, Any]:
        resolved = self._launch()
        if "exit_code" in resolved:
            return {"status": "refused", "message": "the flags were refused", **resolved}
        self._next_stage("scheduler start")
        os.environ.update(resolved["env"])
        server_args, port_args = pickle.loads(resolved["arguments"])
        init_info = self._start_schedulers(resolved["arguments"], server_args.tp_size)
        self._next_stage("requests")
        tokenizer = None
        if not server_args.skip_tokenizer_init:
            from sglang.srt.utils.hf_transformers_utils import get_tokenizer

            tokenizer = get_tokenizer(server_args.model_path)
        num_dp_ranks = num_dp_ranks_of(server_args)
        inputs = [input_of(port_args, rank) for rank in range(num_dp_ranks)]
        outputs = self._speak(
            port_args, inputs if num_dp_ranks > 1 else [port_args.scheduler_input_ipc_name], tokenizer
        )
        if self._exit_code():
            raise _Died("the scheduler failed after its last request")
        self._next_stage("")
        answer = {"outputs": outputs, "states": self._states, "init_info": init_info, "seconds": self._seconds}
        return {"status": "ok", **answer}

    def _launch(self) -> dict[str, Any]:
        """Do what the server's main process does, in a process of its own: plugins are loaded per process."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            launcher_process(self._job["flags"], writer)
        os.close(writer)
        data = b""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([reader], [], [], left)[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise _Timeout
            chunk = os.read(reader, 1 << 20)
            if not chunk:
                break
            data += chunk
        os.close(reader)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return pickle.loads(data) if exit_code == 0 and data else {"exit_code": exit_code}

    def _start_schedulers(self, arguments: bytes, tp_size: int) -> dict[str, Any]:
        # A real child of multiprocessing, as SGLang starts it, except that it is forked, not spawned.
        context = multiprocessing.get_context("fork")
        readers = []
        for tp_rank in range(tp_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=scheduler_process, args=(self._job, arguments, tp_rank, writer))
            process.start()
            writer.close()
            readers.append(reader)
            self._schedulers.append(process)
        infos = []
        for reader in readers:
            while not reader.poll(0.1):
                self._check_alive()
            try:
                infos.append(reader.recv())
            except EOFError:
                raise _Died("the scheduler failed to start") from None
        return dict(infos[0])

    def _check_alive(self) -> None:
        if time.monotonic() > self._deadline:
            raise _Timeout
        if any(process.exitcode for process in self._schedulers):
            raise _Died("the scheduler failed")
        if self._connection.poll() or os.getppid() == 1:
            # The test process is gone: nobody waits for the answer.
            raise _Timeout

    def _speak(self, port_args: Any, inputs: list[str], tokenizer: Any) -> dict[str, dict[str, Any]]:
        from sglang.srt.managers.io_struct import ShutdownReq, sock_recv
        from sglang.srt.utils.network import get_zmq_socket

        context = zmq.Context(1)
        to_schedulers = [get_zmq_socket(context, zmq.PUSH, name, True) for name in inputs]
        from_scheduler = get_zmq_socket(context, zmq.PULL, port_args.tokenizer_ipc_name, True)
        # With a tokenizer the outputs go to the detokenizer; here they come together.
        from_scheduler.bind(port_args.detokenizer_ipc_name)
        outputs = self._outputs
        try:
            # Ranks with requests of their own take turns.
            for (rid, request), to_scheduler in zip(
                self._job["requests"], itertools.cycle(to_schedulers), strict=False
            ):
                outputs[rid] = empty_output(len(request.input_ids))
                self._send(to_scheduler, generate_message(rid, request, tokenizer))
            while any(output["finish_reason"] is None for output in outputs.values()):
                if from_scheduler.poll(100):
                    take(outputs, sock_recv(from_scheduler), self._states)
                else:
                    self._check_alive()
            # Not before all answers are here: a scheduler that ends takes those with it that its socket still holds.
            # The gate holds it back until the idle checks have run.
            self._send(to_schedulers[0], ShutdownReq())
            while self._is_scheduler_alive():
                if from_scheduler.poll(100):
                    take(outputs, sock_recv(from_scheduler), self._states)
                else:
                    self._check_alive()
        finally:
            # Without this, messages that a dead scheduler never took would keep the context open for ever.
            context.destroy(linger=0)
        return outputs

    def _send(self, to_scheduler: Any, message: Any) -> None:
        """Send unless nobody is there any more: one that runs by itself may have ended, and a socket would wait."""
        from sglang.srt.managers.io_struct import sock_send

        while not to_scheduler.poll(100, zmq.POLLOUT):
            self._check_alive()
            if not self._is_scheduler_alive():
                return
        sock_send(to_scheduler, message)

    def _is_scheduler_alive(self) -> bool:
        return any(process.is_alive() for process in self._schedulers)
