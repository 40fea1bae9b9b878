"""Every kernel compiles for the GPUs that are served, spills nothing and fits into their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.aot import MAX_REGISTERS, MOST_SPILLED_BYTES, TARGETS

ROOT = Path(__file__).resolve().parents[2]


def test_every_shipped_configuration_compiles_without_spills_and_fits(tmp_path, record_property):
    # A process of its own: the interpreter, if it is on in this one, leaves nothing to compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "usage.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot", "--json", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=800,
    )
    # Shown at the end of the run.
    record_property("report", done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    usages = json.loads(out.read_text())
    assert {usage["target"] for usage in usages} == set(TARGETS)
    # Each file of kernels ships something.
    for part in (
        "capture",
        "move",
        "summarise",
        "scan",
        "score",
        "reduce",
        "combine",
        "select",
        "sum",
        "mean",
        "compare",
        "weigh",
        "far",
    ):
        assert any(usage["name"].startswith(part) for usage in usages), part
    assert [usage for usage in usages if usage["local_bytes"] > MOST_SPILLED_BYTES] == []
    assert [usage for usage in usages if usage["shared_bytes"] > TARGETS[usage["target"]]] == []
    # All registers of a multiprocessor are 65536: a program must at least fit.
    assert all(0 < usage["registers"] <= MAX_REGISTERS for usage in usages)
    moves = [usage for usage in usages if usage["name"].startswith(("move", "capture"))]
    assert [usage for usage in moves if usage["widest_access_bytes"] != 16] == []
