"""What the command lines of benchmarks have in common."""

import argparse
from pathlib import Path

SMALL_MODEL = ".cache/models/SmolLM2-135M-Instruct"


def benchmark_parser(doc: str | None, *, smoke: str) -> argparse.ArgumentParser:
    """Return a parser that knows ``--out`` and ``--smoke``.

    Args:
        doc: The module's docstring, which ``--help`` shows as it is written.
        smoke: What ``--smoke`` does.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results, default benchmarks/results/HARDWARE")
    parser.add_argument("--smoke", action="store_true", help=smoke)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser, work: Path) -> None:
    """Add what a benchmark with a real model needs: the model, and a folder that an interrupted run goes on from."""
    parser.add_argument("--model", default=SMALL_MODEL, help="folder or hub name, default %(default)s")
    parser.add_argument("--work", type=Path, default=work, help="default %(default)s")
    parser.add_argument("--plot-only", type=Path, metavar="FOLDER", help="only draw the CSVs of a folder again")
