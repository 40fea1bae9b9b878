"""``rkv-sglang patch``: put the series into an SGLang on disk, take it out, or say what of it is in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from rkv_sglang.patching.diffs import Patch
from rkv_sglang.patching.folders import unpacked_folder, version_in
from rkv_sglang.patching.tree import State, TreeError, look, patched, read_series, release_of, releases, write

ACTIONS = ("apply", "revert", "check")


def add_patch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("action", choices=ACTIONS, help="put patches in, take all out, or only look")
    parser.add_argument(
        "--target", required=True, metavar="FOLDER", help="an SGLang: installed, unpacked or checked out"
    )
    parser.add_argument(
        "--only", metavar="NUMBERS", help="with apply: some of the patches, as in 2-6 or 1,3; default: all"
    )


def run_patch(options: argparse.Namespace, out: TextIO | None = None) -> int:
    """Run the command and return its exit status; 1 where the tree is not as it must be, and nothing was written."""
    try:
        return _run(options, out)
    except TreeError as error:
        print(error, file=sys.stderr)
    return 1


def _run(options: argparse.Namespace, out: TextIO | None) -> int:
    folder = unpacked_folder(Path(options.target).expanduser())
    if folder is None:
        raise TreeError(f"there is no sglang in {options.target}: name a folder that has one")
    version = version_in(folder)
    release = release_of(version)
    if release is None:
        raise TreeError(f"there are no patches for SGLang {version}: there are for {', '.join(releases())}")
    series = read_series(release)
    chosen = _chosen(series, options)
    state = look(folder, release)
    if options.action != "check":
        wanted = {*state.applied, *state.partly, *(patch.name for patch in chosen)}
        texts = state.pristine
        if options.action == "apply":
            texts = patched(state, [patch for patch in series if patch.name in wanted])
        try:
            changed = write(folder, texts)
        except OSError as error:
            raise TreeError(f"{folder} could not be written, and all is as before ({error}): mend that") from None
        print(f"{len(changed)} files changed in {folder}", file=out)
        state = look(folder, release)
    _show(series, state, out)
    return 1 if state.partly else 0


def _show(series: tuple[Patch, ...], state: State, out: TextIO | None) -> None:
    for patch in series:
        mark = "in  " if patch.name in state.applied else "PART" if patch.name in state.partly else "out "
        print(f"{mark} {patch.name[:4]} {patch.subject}", file=out)


def _chosen(series: tuple[Patch, ...], options: argparse.Namespace) -> tuple[Patch, ...]:
    if options.only is None:
        return series
    if options.action != "apply":
        raise TreeError(f"--only goes with apply: leave it out of {options.action}")
    numbers: set[int] = set()
    for part in options.only.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise TreeError(f"--only {options.only} is no list of numbers: write it as in 2-6 or 1,3")
        numbers |= set(range(int(first), int(last or first) + 1))
    found = tuple(patch for patch in series if int(patch.name[:4]) in numbers)
    if len(found) != len(numbers):
        raise TreeError(f"--only {options.only} names patches that are not there: there are 1 to {len(series)}")
    return found
