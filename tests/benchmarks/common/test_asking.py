"""Servers that start and end side by side are ended with the process that started them, however it is asked to end."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
# Processes stand in for servers: each must be killed after it was asked to end, and one is never ready.
SCRIPT = """
import contextlib, os, signal, subprocess, sys, time
import psutil
from benchmarks.common.asking import entered_side_by_side
from devtools.launch import end_process_trees, exit_on_first_signal

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
end_process_trees.__kwdefaults__["grace_s"] = 2

@contextlib.contextmanager
def deaf(is_ready):
    process = psutil.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, start_new_session=True)
    try:
        process.stdout.readline()
        # Three threads say so, each in one piece.
        os.write(1, b"%d\\n" % process.pid)
        while not is_ready and process.poll() is None:
            time.sleep(0.05)
        yield process
    finally:
        end_process_trees(process)

# Whoever runs this in the background has it ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
exit_on_first_signal()
with entered_side_by_side({number: deaf(number or MODE == "running") for number in range(3)}) as entered:
    print("entered", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("mode", ["starting", "running"])
@pytest.mark.parametrize("sent", [[signal.SIGTERM] * 3, [signal.SIGINT, signal.SIGTERM, signal.SIGINT]])
def test_signals_while_servers_are_being_ended_leave_none_of_them(mode: str, sent: list[signal.Signals]) -> None:
    command = [sys.executable, "-c", f"MODE = {mode!r}\n{SCRIPT}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        servers = [psutil.Process(int(run.stdout.readline())) for _ in range(3)]
        try:
            if mode == "running":
                assert run.stdout.readline() == "entered\n"
            for number in sent:
                run.send_signal(number)
                time.sleep(0.3)
            assert run.wait(30) == 128 + sent[0]
            assert not [process for process in servers if process.is_running()]
        finally:
            run.kill()
            for process in servers:
                if process.is_running():
                    process.kill()
