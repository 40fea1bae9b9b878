"""Plots from CSVs alone: those that are kept, and what a user is told of folders that cannot be drawn."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.registry import PLOTS
from benchmarks.common.schema import RESULTS
from benchmarks.common.tables import MEMORY, TABLES
from benchmarks.plots import draw_all

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / RESULTS / "cpu"
PNG = b"\x89PNG\r\n\x1a\n"


def test_the_command_draws_every_kept_result_again(tmp_path: Path) -> None:
    for path in KEPT.glob("*.csv"):
        shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", "benchmarks.plots", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    pictures = {Path(line) for line in done.stdout.splitlines()}
    assert pictures == set(tmp_path.glob("*.png")) and {path.name for path in pictures} >= {"memory.png", "scoring.png"}
    for path in pictures:
        content = path.read_bytes()
        assert content.startswith(PNG) and len(content) > 5000
    # Whatever is kept has its plot, so a benchmark cannot be forgotten in the list.
    drawn = {table.name for plot in PLOTS for table in plot.tables}
    assert {path.stem for path in KEPT.glob("*.csv")} <= drawn


def test_every_table_has_one_plot() -> None:
    drawn = [table.name for plot in PLOTS for table in plot.tables]
    assert sorted(drawn) == sorted(table.name for table in TABLES)


@pytest.mark.parametrize("folder", ["", "gone"])
def test_a_folder_without_results_is_one_line(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert draw_all(tmp_path / folder) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no results" in line and "memory.csv" in line


def with_a_word_for_a_speed(text: str) -> str:
    header, first, *rest = text.splitlines()
    fields = first.split(",")
    fields[header.split(",").index("tokens_per_s")] = "fast"
    return "\n".join([header, ",".join(fields), *rest])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("seconds", "hours"), "has the columns"),
        (lambda text: text.replace("\n", ",1\n"), "has the columns"),
        (lambda text: with_a_word_for_a_speed(text), "row 1 has a value of another type"),
        (lambda text: text[: text.rindex(",")], "has a value of another type"),
        (lambda text: text.splitlines(keepends=True)[0], "has no rows"),
    ],
)
def test_a_csv_that_does_not_fit_is_one_line_and_the_others_are_drawn(
    tmp_path: Path, change, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = change((KEPT / "memory.csv").read_text())
    (tmp_path / f"{MEMORY.name}.csv").write_text(wrong)
    shutil.copy(KEPT / "scoring.csv", tmp_path)
    assert draw_all(tmp_path) == 1
    printed = capsys.readouterr()
    # Others say things there, too, such as that fonts are looked for.
    (line,) = [line for line in printed.err.splitlines() if "memory.csv" in line]
    assert message in line and "Traceback" not in printed.err
    assert printed.out.splitlines() == [str(tmp_path / "scoring.png")]
    assert [path.name for path in tmp_path.glob("*.png")] == ["scoring.png"]


def test_matplotlib_says_nothing_of_its_own_on_the_standard_error(tmp_path: Path) -> None:
    # Where matplotlib never ran, a slow machine sees it announce its font cache after five seconds: here at once.
    code = """
import sys, threading
from pathlib import Path
threading.Timer = lambda seconds, say: type("AtOnce", (), {"start": lambda self: say(), "cancel": lambda self: None})()
from benchmarks.plots import draw_all
sys.exit(draw_all(Path(sys.argv[1])))
"""
    shutil.copy(KEPT / "scoring.csv", tmp_path)
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path / "never_used")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_command_has_no_plot(capsys: pytest.CaptureFixture[str]) -> None:
    # An installed package has no benchmarks.
    from rkv_sglang import cli

    with pytest.raises(SystemExit, match="2"):
        cli.main(["plot", str(KEPT)])
    assert "invalid choice: 'plot'" in capsys.readouterr().err
