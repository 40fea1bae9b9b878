"""A forked Python does what a new one does: arguments, paths, environment, what it spawns, how it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness.environment import PROJECT_ROOT, child_environment
from tests.support.harness.forked_python import ForkedPython

PROGRAM = """
import multiprocessing, os, sys

def spawned(queue):
    names = ("ADDED", "GIVEN")
    loaded = [name for name in ("sglang", "rkv_sglang") if name in sys.modules]
    has_parent = multiprocessing.parent_process() is not None
    queue.put([{name: os.environ.get(name) for name in names}, sys.argv, __name__, loaded, has_parent, os.getcwd()])

if __name__ == "__main__":
    loaded = [name for name in ("sglang", "rkv_sglang") if name in sys.modules]
    print(sys.argv, sys.path[:2], loaded, os.environ["GIVEN"], os.getcwd())
    os.environ["ADDED"] = "later"
    multiprocessing.set_start_method("spawn", force=True)
    queue = multiprocessing.Queue()
    process = multiprocessing.Process(target=spawned, args=(queue,))
    process.start()
    print(queue.get())
    process.join()
    print(process.exitcode)
    sys.exit("why it ends")
"""


@pytest.mark.parametrize("kind", ["script", "code", "module"])
def test_it_prints_and_ends_as_a_new_one_does(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "program_of_the_test.py"
    script.write_text(PROGRAM)
    code = "import sys, os; print(sys.argv, os.environ['GIVEN'], 'sglang' in sys.modules); raise ValueError(3)"
    argv = {"script": [str(script)], "code": ["-c", code], "module": ["-m", script.stem]}[kind] + ["a", "--b"]
    env = child_environment(env={"GIVEN": "from the start"})
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    new = subprocess.run([sys.executable, *argv], env=env, cwd=PROJECT_ROOT, capture_output=True, text=True)
    forked = ForkedPython(argv, env, stdout=tmp_path / "out", stderr=tmp_path / "err")
    assert forked.wait(60) == new.returncode == 1
    assert (tmp_path / "out").read_text() == new.stdout != ""
    assert (tmp_path / "err").read_text().splitlines()[-1:] == new.stderr.splitlines()[-1:] != []


def test_it_is_seen_to_be_killed(tmp_path: Path) -> None:
    argv = ["-c", "import time; time.sleep(100)"]
    forked = ForkedPython(argv, child_environment(), stdout=tmp_path / "out", stderr=tmp_path / "err")
    assert forked.poll() is None
    forked.kill()
    assert forked.wait(30) == forked.poll() == -signal.SIGKILL
