"""Shapes of functions, as they are compared between two releases: parameters, and a hash of the syntax tree."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
DIGITS = 16


def bare_parameters(function: FunctionNode) -> str:
    """Return a function's parameters with their defaults and without annotations, in parentheses."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
    annotations = [argument.annotation for argument in every]
    for argument in every:
        argument.annotation = None
    text = ast.unparse(arguments)
    for argument, annotation in zip(every, annotations, strict=True):
        argument.annotation = annotation
    return f"({text})"


def parameters_differ(used: str, function: FunctionNode) -> bool:
    """Return whether a function's parameters are not those that a hook uses.

    Args:
        used: The parameters of the hook, as ``bare_parameters`` writes them. With ``*args`` and ``**kwargs`` further
            ones may follow, else there must be no others. Those that are named must be there, in the same place if
            they may be given by position, with the same default or none.
        function: The function of SGLang.
    """
    wanted, found = _arguments(used), function.args
    wanted_by_place, found_by_place = list(_by_place(wanted)), list(_by_place(found))
    if found_by_place[: len(wanted_by_place)] != wanted_by_place:
        return True
    found_by_name = dict(_by_name(found))
    if any(found_by_name.get(name, "missing") != default for name, default in _by_name(wanted)):
        return True
    is_open_by_name = wanted.kwarg is not None
    is_open_by_place = wanted.vararg is not None and is_open_by_name
    is_longer = len(found_by_place) > len(wanted_by_place) or found.vararg is not None
    has_others = not found_by_name.keys() <= dict(_by_name(wanted)).keys() or found.kwarg is not None
    return (is_longer and not is_open_by_place) or (has_others and not is_open_by_name)


def _arguments(text: str) -> ast.arguments:
    function = ast.parse(f"def f{text}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def _by_place(arguments: ast.arguments) -> Iterator[tuple[str, str | None]]:
    """Yield (name, default) of what may be given by position."""
    places = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(places) - len(arguments.defaults)) + [ast.unparse(one) for one in arguments.defaults]
    yield from zip((place.arg for place in places), defaults, strict=True)


def _by_name(arguments: ast.arguments) -> Iterator[tuple[str, str | None]]:
    """Yield (name, default) of what must be given by name."""
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield argument.arg, None if default is None else ast.unparse(default)


def body_hash(function: FunctionNode) -> str:
    """Return a hash of a function's syntax tree without docstrings; comments and layout are not in the tree.

    The same for every version of Python: fields that only some of them have are empty in older code, and are left out.
    """
    digest = hashlib.sha256()
    for part in _parts(function):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:DIGITS]


def _parts(node: object) -> Iterator[str]:
    if isinstance(node, ast.AST):
        yield f"<{type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(value, list) and _starts_with_text(value):
                value = value[1:]
            if value is not None and value != [] and name not in ("ctx", "kind", "type_comment"):
                yield name
                yield from _parts(value)
        yield ">"
    elif isinstance(node, list):
        for item in node:
            yield from _parts(item)
    else:
        yield repr(node)


def _starts_with_text(body: list[object]) -> bool:
    first = body[0] if body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
