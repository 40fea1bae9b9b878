"""The run of all benchmarks: it fails when one of them does, or leaves out or spoils a table."""

import sys
from pathlib import Path

import pytest

from benchmarks.common.registry import BENCHMARKS, Benchmark, Plot
from benchmarks.common.schema import RESULTS
from benchmarks.common.tables import MEMORY, TABLES
from benchmarks.smoke import run_command, run_steps

KEPT = Path(__file__).resolve().parents[2] / RESULTS / "cpu" / "memory.csv"
# Of what is appended; the header is no row.
NEXT_ROW = len(KEPT.read_text().splitlines())
COPY = f"import shutil; shutil.copy({str(KEPT)!r}, sys.argv[1])"


class Script(Benchmark):
    """A step that runs a line of Python with the folder as its argument."""

    def smoke_command(self, out: Path) -> list[str]:
        return [sys.executable, "-c", f"import sys; {self.module}", str(out)]


def script(name: str, code: str) -> Script:
    return Script(name, code, (Plot("benchmarks.memory:plot", (MEMORY,)),))


@pytest.mark.parametrize(
    "code, told",
    [
        (COPY, "passed"),
        ("pass", "memory.csv is missing"),
        (f"{COPY}; print('the cause'); sys.exit(3)", "exit status 3"),
        (f"{COPY}; open(sys.argv[1] + '/memory.csv', 'a').write('x,rkv\\n')", f"memory.csv, row {NEXT_ROW}"),
        ("open(sys.argv[1] + '/memory.csv', 'w').write('round\\n1\\n')", "memory.csv has the columns"),
    ],
)
def test_a_step_must_end_well_and_leave_its_tables(
    tmp_path: Path, code: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    failed = run_steps((script("good", COPY), script("tried", code)), out)
    lines = capsys.readouterr().out.splitlines()
    assert failed == (told != "passed")
    assert lines[1].startswith("smoke 2/2: tried ...") and told in lines[1]
    assert lines[-1] == f"{2 - failed} passed, {failed} failed"
    assert ("  the cause" in lines) == ("the cause" in code)


def test_results_of_an_earlier_run_do_not_pass_for_new_ones(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_steps((script("writes", COPY),), out) == 0
    assert run_steps((script("writes nothing", "pass"),), out) == 1


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_command([sys.executable, "-c", code], tmp_path / "log", 2) == "not done after 2 s"


def test_every_table_is_written_by_one_step() -> None:
    written = [table.name for step in BENCHMARKS for table in step.tables if not step.script]
    # A rehearsal has a folder of its own, where the same table may lie again.
    rehearsed = [(step.name, table.name) for step in BENCHMARKS for table in step.tables if step.script]
    assert len(written) == len(set(written)) and len(rehearsed) == len(set(rehearsed))
    assert {*written, *(name for _, name in rehearsed)} == {table.name for table in TABLES}
