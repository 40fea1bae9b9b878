"""Triton's interpreter, spared what takes most of its time; what a kernel computes in it stays the same."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_get_np_dtype = interpreter._get_np_dtype
_new_block_type = tl.core.block_type.__init__
_np_dtypes: dict[str, Any] = {}
_block_types: dict[Any, dict[str, Any]] = {}


def patch_language() -> Any:
    """Give the language its interpreted meaning for good; return what gives it back its own, by ``restore``.

    The interpreter does so anew at each call of a function; whoever calls this lets it do ``patch_nothing`` instead.
    """
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    _hasten(scope)
    return scope


def patch_nothing(function: object) -> Any:
    """Stand for the interpreter's ``_patch_lang`` once the language is patched."""
    return interpreter._LangPatchScope()


def _hasten(scope: Any) -> None:
    builder, semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic
    # Every sum of integers is worked out once more in 64 bits, for an assertion that is made with ``debug`` alone.
    if not builder.options.debug:
        scope.set_attr(builder, "options", replace(builder.options, sanitize_overflow=False))
    # A type's table of twenty others is built to look up one of them.
    scope.set_attr(interpreter, "_get_np_dtype", _np_dtype)
    scope.set_attr(tl.core.block_type, "__init__", _init_block_type)
    scope.set_attr(tl.core.tensor, "__init__", _init_tensor)
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(lhs: Any, rhs: Any) -> tuple[Any, Any]:
        is_alike = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values
        return (lhs, rhs) if is_alike else broadcast(lhs, rhs)

    scope.set_attr(semantic, "broadcast_impl_value", broadcast_impl_value)


def _np_dtype(of: Any) -> Any:
    name = of.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _get_np_dtype(of)
    return _np_dtypes[name]


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """Types don't change: those that are equal share all that is known of them."""
    key = (element_ty.name, *[size.value if isinstance(size, tl.core.constexpr) else size for size in shape])
    if key not in _block_types:
        _new_block_type(self, element_ty, shape)
        _block_types[key] = self.__dict__
    self.__dict__ = _block_types[key]


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    known = type.__dict__.get("_of_tensors")
    if known is None:
        shape = [*type.shape] if type.is_block() else []
        sizes = tl.core.tuple([tl.core.constexpr(size) for size in shape])
        known = type.__dict__["_of_tensors"] = (sizes, tl.core.constexpr(math.prod(shape)))
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = known
