"""Results of benchmarks: what is written is what is read, and nothing that the documented columns do not cover."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.schema import RESULTS, Column, Table, read_table, run_info, write_table
from benchmarks.common.tables import TABLES

ROOT = Path(__file__).resolve().parents[3]
TABLE = Table(
    "example",
    "one example",
    (
        Column("name", str, "", "its name"),
        Column("count", int, "tokens", "some"),
        Column("speed", float, "1/s", "fast"),
    ),
)


def test_the_command_of_a_folder_is_the_one_that_was_given(tmp_path: Path) -> None:
    folder = tmp_path / "some_benchmark"
    folder.mkdir()
    code = "from benchmarks.common.schema import run_info\nprint(run_info()['command'])"
    (folder / "__main__.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "some_benchmark", "--smoke"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["python -m some_benchmark --smoke"], done.stderr


def test_rows_come_back_as_they_were_written(tmp_path: Path, rng: random.Random) -> None:
    rows = [
        {"name": rng.choice(["a", 'b,"c"', "line\nbreak", ""]), "count": rng.randint(-9, 9), "speed": rng.random()}
        for _ in range(rng.randint(0, 8))
    ]
    info = run_info(flags=["--x"], file=str(Path.cwd() / "a" / "b.txt"))
    path = write_table(tmp_path / "deeper", TABLE, rows, info)
    assert read_table(path.parent, TABLE) == rows
    info = json.loads(path.with_suffix(".json").read_text())
    assert {"command", "date", "commit", "versions", "hardware", "settings"} == set(info)
    assert info["settings"] == {"flags": ["--x"], "file": "a/b.txt"} and info["versions"]["sglang"] == "0.5.23"


@pytest.mark.parametrize(
    "row",
    [
        {"name": "a", "count": 1},
        {"name": "a", "count": 1, "speed": 1.0, "more": 2},
        {"name": "a", "count": 1.5, "speed": 1.0},
        {"name": "a", "count": True, "speed": 1.0},
        {"name": 3, "count": 1, "speed": 1.0},
        {"name": "a", "count": 1, "speed": "1.0"},
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="example"):
        write_table(tmp_path, TABLE, [{"name": "a", "count": 1, "speed": 2.0}, row], {})  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "example.csv").write_text("name,count\na,1\n")
    with pytest.raises(ValueError, match="columns"):
        read_table(tmp_path, TABLE)


def test_tables_are_documented_and_what_is_kept_fits_them() -> None:
    assert len({table.name for table in TABLES}) == len(TABLES)
    for table in TABLES:
        assert table.row and all(column.meaning for column in table.columns)
        assert len({column.name for column in table.columns}) == len(table.columns)
        for path in (ROOT / RESULTS).glob(f"*/{table.name}.csv"):
            rows = read_table(path.parent, table)
            assert rows
            for row in rows:
                table.check(row)
            with path.open(newline="") as file:
                assert next(csv.reader(file)) == [column.name for column in table.columns]
