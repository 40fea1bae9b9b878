"""Triton's interpreter, spared what takes most of its time."""

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_language() -> Any:
    """Give the language its interpreted meaning for good; return what gives it back its own, by ``restore``.

    The interpreter does so anew at each call of a function; whoever calls this lets it do ``patch_nothing`` instead.
    """
    return interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


def patch_nothing(function: object) -> Any:
    """Stand for the interpreter's ``_patch_lang`` once the language is patched."""
    return interpreter._LangPatchScope()
