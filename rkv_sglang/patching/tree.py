"""An SGLang on disk and the series made for it: which patches are in, and putting some in or taking all out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rkv_sglang.patching.diffs import Patch, change, read_patch

# In a checkout a link to the folder at its top; a wheel holds the files themselves.
PATCHES = Path(__file__).with_name("patches")
# Of every touched file, as the release has it: its hash. Made by ``python -m devtools.contract``.
PRISTINE_FILE = "pristine.json"
DIGITS = 32


class TreeError(ValueError):
    """A tree that cannot be patched; one line that names the cause and the mend."""


@dataclass(frozen=True)
class State:
    """What of the series is in a tree.

    Attributes:
        applied: Names of the patches that are in.
        partly: Names of those of which only some files are, as after a crash.
        pristine: The text of every touched file without any patch; None where there is none.
    """

    applied: tuple[str, ...]
    partly: tuple[str, ...]
    pristine: dict[str, str | None]


def releases() -> list[str]:
    """Return the releases of SGLang for which there is a series."""
    return sorted(path.name for path in PATCHES.iterdir() if path.is_dir())


def read_series(release: str) -> tuple[Patch, ...]:
    """Return the patches made for a release, in their order."""
    return tuple(read_patch(file) for file in sorted((PATCHES / release).glob("*.patch")))


def text_hash(text: str) -> str:
    """Return the hash of a file's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def look(folder: Path, release: str) -> State:
    """Find out what of the series made for a release is in a tree. Writes nothing.

    Raises:
        TreeError: A file that a patch touches is not the release's, whatever patches are taken out of it, or lies
            elsewhere.
    """
    series = read_series(release)
    pristine_hashes: dict[str, str] = json.loads((PATCHES / release / PRISTINE_FILE).read_text(encoding="utf-8"))
    pristine: dict[str, str | None] = {}
    found: dict[str, set[str]] = {patch.name: set() for patch in series}
    for path in sorted({path for patch in series for path in patch.hunks}):
        text: str | None = _read(folder, path)
        for patch in reversed(series):
            if text is not None and path in patch.hunks:
                before = change(text, patch.hunks[path], reverse=True)
                if before is not None:
                    found[patch.name].add(path)
                    text = None if path in patch.new_files and before == "" else before
        if (None if text is None else text_hash(text)) != pristine_hashes.get(path):
            raise TreeError(f"{path} is not that of SGLang {release}: bring back the release's own, then try again")
        pristine[path] = text
    applied = tuple(patch.name for patch in series if found[patch.name] == patch.hunks.keys())
    partly = tuple(patch.name for patch in series if found[patch.name] and patch.name not in applied)
    return State(applied, partly, pristine)


def patched(state: State, series: Iterable[Patch]) -> dict[str, str | None]:
    """Return the texts of all touched files with some patches in.

    Raises:
        TreeError: One needs another one that is not among them.
    """
    texts = dict(state.pristine)
    for patch in series:
        for path, hunks in patch.hunks.items():
            text = change(texts[path] or "", hunks)
            if text is None or (path in patch.new_files) != (texts[path] is None):
                raise TreeError(f"{patch.name} does not go in by itself: apply those before it, too")
            texts[path] = text
    return texts


def write(folder: Path, texts: dict[str, str | None]) -> list[str]:
    """Bring files to these texts, all or none; return the paths that changed. None removes a file.

    Every new text is on disk beside its file before the first one takes its place.

    Raises:
        OSError: A file could not be written; all are as before.
    """
    before = {path: _read(folder, path) for path in texts}
    changed = [path for path, text in texts.items() if text != before[path]]
    staged: dict[str, str] = {}
    done: list[str] = []
    try:
        for path in changed:
            staged[path] = _stage(folder / path, texts[path])
        for path in changed:
            done.append(path)
            _put(folder / path, staged[path])
    except BaseException:
        for path in done:
            # As before, from what was read.
            _put(folder / path, _stage(folder / path, before[path]))
        raise
    finally:
        for name in filter(None, staged.values()):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    return changed


def _stage(file: Path, text: str | None) -> str:
    """Write a text beside its file, with that one's mode; return its place, empty for no text."""
    if text is None:
        return ""
    descriptor, name = tempfile.mkstemp(prefix=".rkv-patch-", dir=file.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as staged:
            staged.write(text)
            staged.flush()
            os.fsync(staged.fileno())
        # A new file gets the mode of its neighbour.
        like = file if file.exists() else file.parent / "__init__.py"
        os.chmod(name, like.stat().st_mode & 0o7777 if like.exists() else 0o644)
    except BaseException:
        os.unlink(name)
        raise
    return name


def _put(file: Path, staged: str) -> None:
    if staged:
        # In the place of the old one, which may be shared by hard links with an installer's cache.
        os.replace(staged, file)
    else:
        file.unlink(missing_ok=True)


def _read(folder: Path, path: str) -> str | None:
    """Return a file's text, byte for byte; None if there is none.

    Raises:
        TreeError: It lies elsewhere, behind a link, or is no file of text.
    """
    place = folder
    for part in path.split("/"):
        place = place / part
        if place.is_symlink():
            raise TreeError(f"{place} is a link: name the folder that it leads to, or a tree of real files")
    if not place.exists():
        return None
    try:
        with open(place, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise TreeError(f"{place} cannot be read ({error}): bring back the release's own") from None


def release_of(version: str) -> str | None:
    """Return the release, among those with a series, of which a version is made; None if there is none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found[0] if found is not None and found[0] in releases() else None
