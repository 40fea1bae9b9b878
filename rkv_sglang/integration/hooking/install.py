"""Apply hooks so that nothing is swallowed."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any

from rkv_sglang.integration.hooking.hook import Hook

PLUGIN_NAME = "rkv_sglang"
DISTRIBUTION_NAME = "rkv-sglang"


def _static(target: str) -> Any:
    """Return the target as its owner holds it, descriptors of static and class methods taken off."""
    owner_path, _, name = target.rpartition(".")
    found = inspect.getattr_static(pkgutil.resolve_name(owner_path), name)
    return found.__func__ if isinstance(found, classmethod | staticmethod) else found


def is_applied(hook: Hook) -> bool:
    """Return whether the target, unwrapped step by step, is the product of this hook."""
    found = _static(hook.target)
    while found is not None:
        if found is hook.function or hook.function in _closure_values(found):
            return True
        found = getattr(found, "__wrapped__", None)
    return False


def _closure_values(function: Any) -> list[Any]:
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]


def register_hooks(hooks: Iterable[Hook]) -> None:
    """Hand the hooks to SGLang's registry, which applies them at the end of plugin loading."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType[hook.kind])


def register_steps(hooks: Iterable[Hook]) -> None:
    """Put hooks of the kind ``"STEP"`` around their steps of SGLang's resolution of arguments."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    for hook in hooks:
        register_resolution_hook(hook.target.rpartition(".")[2])(hook.function)


def install(hooks: tuple[Hook, ...]) -> None:
    """Apply the hooks now, around whatever other plugins put there, and see each one applied.

    ``HookRegistry.apply_hooks`` would log a failure and go on, and leave out a target that another plugin hooked. That
    SGLang is as the hooks expect is the contract's to say (``releases.require_contract``).

    Raises:
        RuntimeError: A hook could not be applied; one line.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource(plugin_name=PLUGIN_NAME, dist_name=DISTRIBUTION_NAME)
    for hook in hooks:
        if is_applied(hook):
            continue
        HookRegistry._apply_target(hook.target, [(HookType[hook.kind], hook.function, source)])
        HookRegistry._patched.add(hook.target)
        if not is_applied(hook):
            raise RuntimeError(f"the hook on {hook.target} did not take: set SGLANG_PLUGINS=rkv_sglang and start again")
