"""The one runtime of this process. Hooks reach it here; it exists only where a policy is on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rkv_sglang.integration.runtime.runtime import Runtime

_runtime: Runtime | None = None


def set_runtime(runtime: Runtime) -> None:
    """Install the process's runtime, once, before any hook that needs it is applied."""
    global _runtime
    _runtime = runtime


def get_runtime() -> Runtime:
    """Return the process's runtime.

    Raises:
        RuntimeError: There is none: a hook was applied in a process that serves without a policy.
    """
    if _runtime is None:
        raise RuntimeError("a KV policy hook ran in a process without a KV policy; please report this")
    return _runtime
