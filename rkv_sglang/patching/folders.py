"""Folders with an SGLang in them, and the versions of it that they say. Nothing of SGLang is imported."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = "sglang"


def installed_folder(package: str = PACKAGE) -> Path | None:
    """Return the folder of an installed package, which is not imported; None if there is none."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def unpacked_folder(path: Path) -> Path | None:
    """Return the package's folder in an unpacked wheel or a checkout, or at the path itself; None if there is none."""
    for folder in (path, path / PACKAGE, path / "python" / PACKAGE):
        if (folder / "srt").is_dir() and (folder / "__init__.py").is_file():
            return folder
    return None


def version_in(folder: Path) -> str:
    """Return the version of the SGLang in a folder, as its own files say, or those of its wheel; else ``unknown``."""
    wheels = [path.name for path in folder.parent.glob(f"{PACKAGE}-*.dist-info")]
    if len(wheels) == 1:
        return wheels[0].removeprefix(f"{PACKAGE}-").removesuffix(".dist-info")
    try:
        text = (folder / "_version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    written = re.search(r"^__version__ = (?:version = )?'([^']+)'", text, re.MULTILINE)
    if written is not None:
        return written[1]
    if folder == installed_folder():
        try:
            return version(PACKAGE)
        except PackageNotFoundError:
            pass
    return "unknown"
