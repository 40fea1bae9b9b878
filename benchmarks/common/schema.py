"""How every benchmark keeps its results: a CSV with the columns of ``tables.py``, and beside it a JSON of the run.

The JSON says what a reader needs to judge or repeat the run: command, date, commit, versions, hardware, and whatever
the benchmark adds (flags of its servers, sizes).
"""

import csv
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
PACKAGES = ("rkv_sglang", "sglang", "torch", "triton", "transformers", "numpy")
Value = str | int | float
Row = dict[str, Value]


@dataclass(frozen=True)
class Column:
    """One column: its name, the type of its values, their unit (empty for a count or a name) and what they mean."""

    name: str
    kind: type[str] | type[int] | type[float]
    unit: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """One kind of CSV: its file's stem, what a row is, and its columns in order."""

    name: str
    row: str
    columns: tuple[Column, ...]

    def check(self, row: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless ``row`` has exactly these columns with values of their types."""
        names = [column.name for column in self.columns]
        if sorted(row) != sorted(names):
            wrong = sorted(set(names) ^ set(row))
            raise ValueError(f"a row of {self.name} must have the columns {names}: {wrong} are missing or unknown")
        for column in self.columns:
            value = row[column.name]
            fits = isinstance(value, int | float) if column.kind is float else isinstance(value, column.kind)
            if isinstance(value, bool) or not fits:
                raise ValueError(f"{self.name}.{column.name} is {value!r}, not of type {column.kind.__name__}")


def hardware_folder(results: Path = RESULTS) -> Path:
    """Return the folder for this machine's results, ``cpu`` or the GPU's name."""
    import torch

    name = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    return results / name


def run_info(**settings: Any) -> dict[str, Any]:
    """Return what must be known of a run: command, date, commit, versions, hardware, and ``settings``."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": shlex.join(["python", *_program(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
        "hardware": _hardware(),
        "settings": {name: _in_checkout(value) for name, value in settings.items()},
    }


def _in_checkout(value: Any) -> Any:
    """Return a path within the working directory as one that means the same on another machine."""
    return value.removeprefix(f"{Path.cwd()}/") if isinstance(value, str) else value


def write_table(folder: Path, table: Table, rows: Iterable[Mapping[str, Value]], info: Mapping[str, Any]) -> Path:
    """Write ``<table>.csv`` and ``<table>.json`` into ``folder`` (made if need be) and return the CSV's path.

    Raises:
        ValueError: A row does not fit the table.
    """
    rows = list(rows)
    for row in rows:
        table.check(row)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{table.name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[column.name for column in table.columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
    return path


def read_table(folder: Path, table: Table) -> list[Row]:
    """Return the rows of ``<table>.csv`` in ``folder``, values in their types.

    Raises:
        ValueError: The file does not fit the table.
    """
    with (folder / f"{table.name}.csv").open(newline="") as file:
        raw = list(csv.DictReader(file))
    kinds = {column.name: column.kind for column in table.columns}
    rows: list[Row] = []
    for number, line in enumerate(raw, start=1):
        # A line with too many values has the rest under the name None, one with too few has None as a value.
        if set(line) != set(kinds):
            found = [str(name) for name in line]
            raise ValueError(f"{table.name}.csv has the columns {sorted(found)} instead of {sorted(kinds)}")
        try:
            rows.append({name: kinds[name](value) for name, value in line.items()})
        except (TypeError, ValueError):
            raise ValueError(f"{table.name}.csv, row {number} has a value of another type than its column") from None
    return rows


def _program() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # A folder is run by its own name, and Python adds this one.
    return ["-m", spec.name.removesuffix(".__main__")] if spec is not None else sys.argv[:1]


def _commit() -> str:
    try:
        commit = _git("describe", "--always", "--exclude=*", "--abbrev=12")
        # Results that an earlier benchmark wrote change nothing that is measured.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    except OSError:
        return "unknown"
    return f"{commit}-dirty" if changed else commit or "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def _hardware() -> dict[str, Any]:
    import psutil
    import torch

    hardware: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
        hardware["cuda"] = torch.version.cuda
    return hardware
