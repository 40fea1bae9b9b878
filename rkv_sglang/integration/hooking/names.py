"""Look for a name of SGLang that a hook relies on, without making an object of its class."""

import functools
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any


def is_there(name: str) -> bool:
    """Return whether a dotted path names something in what is installed. Imports its module.

    An attribute of a class is there too if the module of the class or of a base annotates it, or has it of ``self``.
    """
    owner_path, _, attribute = name.rpartition(".")
    try:
        owner = pkgutil.resolve_name(owner_path)
    except (ImportError, AttributeError):
        return False
    if hasattr(owner, attribute):
        return True
    if not isinstance(owner, type):
        return False
    pattern = re.compile(rf"\bself\.{attribute}\b|^\s+{attribute}\s*:", re.MULTILINE)
    return any(pattern.search(_source(part.__module__)) for part in owner.__mro__ if part is not object)


@functools.cache
def _source(module: str) -> str:
    path: Any = inspect.getsourcefile(pkgutil.resolve_name(module)) if module != "builtins" else None
    return Path(path).read_text(encoding="utf-8") if path else ""
