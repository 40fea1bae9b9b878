"""Kernels run in Triton's interpreter, on CPU tensors; in modules marked ``gpu`` only in a rehearsal."""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from benchmarks.common.device import REHEARSAL, stand_in_for_gpu


@functools.cache
def _interpreted(function: Callable[..., Any]) -> interpreter.InterpretedFunction:
    return interpreter.InterpretedFunction(function)


@pytest.fixture(scope="module", autouse=True)
def interpret(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let every compiled function, Triton's own ones too, be interpreted while the tests of a module run.

    TRITON_INTERPRET counts when Triton is imported, and by then another test may have imported it.
    """
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if on_gpu and not REHEARSAL:
        yield
        return

    def launch(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return _interpreted(kernel.fn).run(*args, **kwargs)

    def call(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return _interpreted(kernel.fn)(*args, **kwargs)

    # The interpreter replaces the language anew at each call of a function, and for those inside a kernel for good.
    language = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(JITFunction, "run", launch)
        monkeypatch.setattr(JITFunction, "__call__", call)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
        monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        if on_gpu:
            stand_in_for_gpu(monkeypatch.setattr)
        yield
    language.restore()
