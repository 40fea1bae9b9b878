"""The source files of a package as syntax trees: read from its folder, never imported."""

from __future__ import annotations

import ast
import contextlib
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path

from rkv_sglang.patching.folders import PACKAGE


class Sources:
    """The modules of one package, each parsed when it is first asked for.

    Attributes:
        folder: The package's own folder.
        package: Its name.
        read: Every file that was asked for and is there, as a path in the folder.
    """

    def __init__(self, folder: Path, texts: Mapping[str, str] | None = None, package: str = PACKAGE) -> None:
        """Take a folder; ``texts`` stand for some of its files, by path."""
        self.folder = folder
        self.texts = texts or {}
        self.package = package
        self.read: set[str] = set()
        self._trees: dict[str, ast.Module | None] = {}

    def file_of(self, module: str) -> str | None:
        """Return the path in the folder of a dotted module's source; None if it is no module of the package."""
        top, _, rest = module.partition(".")
        if top != self.package:
            return None
        path = rest.replace(".", "/")
        candidates = (f"{path}/__init__.py", f"{path}.py") if path else ("__init__.py",)
        return next((name for name in candidates if (self.folder / name).is_file()), None)

    def modules_in(self, module: str) -> Iterator[str]:
        """Yield the modules right in a folder of the package, by their dotted names."""
        for path in sorted((self.folder / module.partition(".")[2].replace(".", "/")).glob("*.py")):
            if path.stem != "__init__":
                yield f"{module}.{path.stem}"

    def tree_of(self, module: str) -> ast.Module | None:
        """Return a module's syntax tree; None if it is no module of the package, or no Python."""
        if module not in self._trees:
            name = self.file_of(module)
            if name is not None:
                self.read.add(name)
            self._trees[module] = None if name is None else self._parse(name)
        return self._trees[module]

    def _parse(self, name: str) -> ast.Module | None:
        try:
            return ast.parse(self.texts.get(name) or (self.folder / name).read_bytes())
        except (OSError, SyntaxError, ValueError):
            return None


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keep Python's garbage collector from looking at every node of the trees again and again, for the while.

    Reading sources takes half the time so.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
