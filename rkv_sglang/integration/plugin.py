"""The entry point that SGLang calls in every process it starts.

Every process loads this module, so what only a policy needs is imported where it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rkv_sglang.config import NO_POLICY
from rkv_sglang.integration.hooking.install import install, register_hooks, register_steps
from rkv_sglang.integration.hooks.flags import ARGS_HOOKS
from rkv_sglang.integration.hooks.processes import LAUNCHER_HOOKS, PROCESS_HOOKS
from rkv_sglang.integration.hooks.steps import LAST_STEP, STEP_HOOKS
from rkv_sglang.integration.startup.server_args import policy_name


def register() -> None:
    """Add the flags, and see that a policy, once asked for, is either wholly in place or refused.

    Without a policy nothing else of SGLang is touched: the two process hooks and the two steps only look at the flag.
    """
    register_hooks(ARGS_HOOKS)
    # A hook makes its target's module import; only processes that already have it need it.
    register_hooks(hook for hook in PROCESS_HOOKS if _module_of(hook.target) in sys.modules)
    register_steps(STEP_HOOKS)
    _register_launch_check()


def _module_of(method: str) -> str:
    return method.rsplit(".", 2)[0]


def _register_launch_check() -> None:
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    @register_resolution_hook(LAST_STEP)  # type: ignore[untyped-decorator]  # SGLang is checked as Any
    def check_before_launch(server_args: Any, previous: Callable[[Any], None]) -> None:
        previous(server_args)
        if policy_name(server_args) == NO_POLICY:
            return
        from rkv_sglang.integration.hooking.releases import require_contract
        from rkv_sglang.integration.hooks.answers import META_INFO_HOOKS
        from rkv_sglang.integration.startup.errors import stop

        try:
            # Seen at the first step already, unless another plugin took the place of that one.
            require_contract()
            install(LAUNCHER_HOOKS + META_INFO_HOOKS)
            return
        except RuntimeError as error:
            problem = str(error)
        stop(problem)
