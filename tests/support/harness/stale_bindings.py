"""SGLang's ``_propagate_patch`` for forked processes: the same bindings, found in an index instead of in every module.

For every hook SGLang walks through all that thousands of modules hold. In a process that lives for two seconds this is
most of the start, and writing to each object's reference count copies all memory that was forked.
"""

import os
import sys
import types
from collections import defaultdict
from types import ModuleType

# Set in a run's environment, it has SGLang's own function look for what was missed.
CHECK_VARIABLE = "RKV_TEST_CHECK_BINDINGS"
_HOOKABLE = (type, types.FunctionType)


class StaleBindings:
    """Which modules hold which function or class, as of now. Build it before forking, when all imports are done."""

    def __init__(self) -> None:
        # Ids stay their own: what they stand for is held here, too.
        self._holders: dict[int, list[ModuleType]] = defaultdict(list)
        self._known: dict[int, object] = {}
        self._modules = {id(module): module for module in _modules()}
        self._loaded: list[object] = []
        self._new: list[ModuleType] = []
        for module in self._modules.values():
            for value in list(vars(module).values()):
                if isinstance(value, _HOOKABLE):
                    self._holders[id(value)].append(module)
                    self._known[id(value)] = value
                if isinstance(value, type):
                    self._know_methods(value)

    def _know_methods(self, owner: type) -> None:
        for method in list(vars(owner).values()):
            method = method.__func__ if isinstance(method, classmethod | staticmethod) else method
            if isinstance(method, types.FunctionType):
                self._known[id(method)] = method

    def propagate(self, original: object, wrapped: object, source_module: object) -> int:
        """Do what SGLang's function of the same arguments does; return the number of bindings replaced."""
        if id(original) in self._known:
            modules = [*self._holders.get(id(original), ()), *self._new_modules()]
        else:
            modules = _modules()
        num_replaced = 0
        for module in modules:
            if module is not source_module:
                for name in [name for name, value in list(vars(module).items()) if value is original]:
                    setattr(module, name, wrapped)
                    num_replaced += 1
                    self._holders[id(wrapped)].append(module)
        # It may be hooked once more; nobody else holds it who was there before.
        self._known[id(wrapped)] = wrapped
        return num_replaced

    def _new_modules(self) -> list[ModuleType]:
        loaded = list(sys.modules.values())
        # Most hooks are applied one after the other, and equal lists of the same objects are compared in no time.
        if loaded != self._loaded:
            self._loaded = loaded
            self._new = [module for module in _modules() if id(module) not in self._modules]
        return self._new


def _modules() -> list[ModuleType]:
    return [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]


def install() -> None:
    """Put the index in the place of SGLang's function; see ``CHECK_VARIABLE``."""
    from sglang.srt.plugins import hook_registry

    walk_through_all, bindings = hook_registry._propagate_patch, StaleBindings()

    def propagate_patch(original: object, wrapped: object, source_module: object) -> int:
        num_replaced = bindings.propagate(original, wrapped, source_module)
        if os.environ.get(CHECK_VARIABLE):
            num_missed = walk_through_all(original, wrapped, source_module)
            print(f"binding of {original}: {num_replaced} replaced, {num_missed} missed", flush=True)
        return num_replaced

    hook_registry._propagate_patch = propagate_patch
