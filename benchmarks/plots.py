"""Draw every plot of a results folder again, from its CSVs alone.

    python -m benchmarks.plots FOLDER

A plot is drawn if at least one of its CSVs is there. Exit status 1, with one line each, if a CSV does not fit its table
or the folder has none.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.common.registry import PLOTS


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
