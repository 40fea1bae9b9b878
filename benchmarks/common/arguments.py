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


def refuse_to_overwrite(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End a smoke run with one line unless it has a folder of its own; else its figures would pass for results."""
    if options.out is None:
        parser.error("--smoke must not overwrite results: name another folder with --out")


def refuse_less_than_one(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """End with one line if one of these options is given and below 1."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
