"""Draw every plot of a results folder again, from its CSVs alone: ``rkv-sglang plot FOLDER``.

    python -m benchmarks.plots FOLDER

A plot is drawn if at least one of its CSVs is there. Exit status 1, with one line each, if a CSV does not fit its table
or the folder has none.
"""

import argparse
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.schema import Table, read_table
from benchmarks.tables import (
    ACCURACY,
    FRONTEND,
    IDLE_COST,
    KERNELS,
    MEMORY,
    QUALITY_FORCED,
    QUALITY_FREE,
    QUALITY_POSITION,
    QUALITY_RECALL,
    SCORING,
    SCORING_RANDOM,
    SERVE_CHECK,
    SERVING,
)


@dataclass(frozen=True)
class Plot:
    """A function that takes a folder and returns the picture it wrote, by name, and the tables it draws.

    By name because the benchmarks import torch and SGLang, which takes seconds.
    """

    function: str
    tables: tuple[Table, ...]

    def is_due(self, folder: Path) -> bool:
        """Return whether the folder has any of the tables."""
        return any((folder / f"{table.name}.csv").exists() for table in self.tables)

    def draw(self, folder: Path) -> Path:
        """Draw it and return the picture's path.

        Raises:
            ValueError: A CSV does not fit its table, or is empty; one line.
        """
        for table in self.tables:
            if (folder / f"{table.name}.csv").exists() and not read_table(folder, table):
                raise ValueError(f"{table.name}.csv has no rows")
        picture: Path = pkgutil.resolve_name(self.function)(folder)
        return picture


PLOTS = (
    Plot("benchmarks.bench_memory:plot", (MEMORY,)),
    Plot("benchmarks.bench_idle_cost:plot", (IDLE_COST,)),
    Plot("benchmarks.bench_scoring:plot", (SCORING, SCORING_RANDOM)),
    Plot("benchmarks.kernel_bench_kit:plot", (KERNELS,)),
    Plot("benchmarks.quality_report:plot", (QUALITY_FORCED, QUALITY_POSITION, QUALITY_FREE, QUALITY_RECALL)),
    Plot("benchmarks.accuracy_report:plot", (ACCURACY,)),
    Plot("benchmarks.frontend_report:plot", (FRONTEND,)),
    Plot("benchmarks.serving_plot:plot", (SERVING,)),
    Plot("benchmarks.gpu.serve_check:plot", (SERVE_CHECK,)),
)


def draw_all(folder: Path) -> int:
    """Draw every plot whose CSVs are in the folder; print one line each and return the exit status."""
    due = [plot for plot in PLOTS if plot.is_due(folder)]
    if not due:
        known = ", ".join(f"{table.name}.csv" for plot in PLOTS for table in plot.tables)
        print(f"plot: {folder} has no results: none of {known}", file=sys.stderr)
        return 1
    status = 0
    for plot in due:
        try:
            print(plot.draw(folder), flush=True)
        except ValueError as error:
            print(f"plot: {folder}: {error}", file=sys.stderr)
            status = 1
    return status


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with CSVs of benchmarks")
    return draw_all(parser.parse_args().folder)


if __name__ == "__main__":
    sys.exit(main())
