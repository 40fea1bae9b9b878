"""Kernels run in Triton's interpreter, on CPU tensors; in modules marked ``gpu`` only in a rehearsal."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import triton
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from benchmarks.common.device import REHEARSAL, stand_in_for_gpu
from tests.support.interpreted import patch_language, patch_nothing


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

    # For functions inside a kernel the interpreter itself would replace the language for good.
    language = patch_language()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(JITFunction, "run", launch)
        monkeypatch.setattr(JITFunction, "__call__", call)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
        monkeypatch.setattr(interpreter, "_patch_lang", patch_nothing)
        if on_gpu:
            stand_in_for_gpu(monkeypatch.setattr)
        yield
    language.restore()
