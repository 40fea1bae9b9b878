"""Check that SGLang is what the hooks were written for, and apply them so that nothing is swallowed."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any

from rkv_sglang.integration.hooking.hook import Hook

SUPPORTED_SGLANG = ("0.5.23",)
PLUGIN_NAME = "rkv_sglang"
DISTRIBUTION_NAME = "rkv-sglang"


def version_problem() -> str | None:
    """Return one line if the installed SGLang is not supported, else None."""
    installed = version("sglang")
    if installed in SUPPORTED_SGLANG:
        return None
    return (
        f"SGLang {installed} is not supported by this rkv_sglang: install sglang=={SUPPORTED_SGLANG[-1]}, "
        "or an rkv_sglang made for your version"
    )


def _resolve(target: str) -> tuple[Any, str]:
    owner_path, _, name = target.rpartition(".")
    return pkgutil.resolve_name(owner_path), name


def _static(target: str) -> Any:
    """Return the target as its owner holds it, descriptors of static and class methods taken off."""
    owner, name = _resolve(target)
    found = inspect.getattr_static(owner, name)
    return found.__func__ if isinstance(found, classmethod | staticmethod) else found


def bare_signature(function: Callable[..., Any]) -> str:
    """Return the signature without annotations; of a bound class method's function, without ``cls``."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "cls"
    ]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def target_problem(hook: Hook) -> str | None:
    """Return one line if SGLang is not as the hook expects, else None. Imports the target and what the hook uses.

    The target must exist and have the hook's signature; all that the hook uses must exist.
    """
    # Here, so that a server without a policy, which checks no target, does not load it.
    from rkv_sglang.integration.hooking.names import is_there

    try:
        found = _static(hook.target)
    except (ImportError, AttributeError) as error:
        return f"{hook.target} does not exist in this SGLang ({error}): install sglang=={SUPPORTED_SGLANG[-1]}"
    for name in hook.uses:
        if not is_there(name):
            return (
                f"{name}, which the hook on {hook.target} uses, does not exist in this SGLang: "
                f"install sglang=={SUPPORTED_SGLANG[-1]} unmodified"
            )
    if isinstance(found, type):
        return None
    signature = bare_signature(found)
    if signature != hook.signature:
        return (
            f"{hook.target} has the signature {signature} instead of {hook.signature}: "
            f"install sglang=={SUPPORTED_SGLANG[-1]} unmodified"
        )
    return None


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


def require_targets(hooks: Iterable[Hook]) -> None:
    """Check version, signatures and the names that are used.

    Raises:
        RuntimeError: The first problem, in one line.
    """
    for problem in installation_problems(hooks):
        raise RuntimeError(problem)


def installation_problems(hooks: Iterable[Hook]) -> Iterator[str]:
    """Yield every reason for which ``require_targets`` would fail, one line each. Imports the targets.

    With an unsupported version no target is looked at.
    """
    problem = version_problem()
    if problem is not None:
        yield problem
        return
    yield from filter(None, map(target_problem, hooks))


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
    """Check the targets, apply the hooks now, around whatever other plugins put there, and see each one applied.

    ``HookRegistry.apply_hooks`` would log a failure and go on, and leave out a target that another plugin hooked.

    Raises:
        RuntimeError: A target is not as expected or a hook could not be applied; one line.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource(plugin_name=PLUGIN_NAME, dist_name=DISTRIBUTION_NAME)
    require_targets(hooks)
    for hook in hooks:
        if is_applied(hook):
            continue
        HookRegistry._apply_target(hook.target, [(HookType[hook.kind], hook.function, source)])
        HookRegistry._patched.add(hook.target)
        if not is_applied(hook):
            raise RuntimeError(f"the hook on {hook.target} did not take: set SGLANG_PLUGINS=rkv_sglang and start again")
