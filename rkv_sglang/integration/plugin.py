"""The entry point that SGLang calls in every process it starts.

Every process loads this module, so what only a policy needs is imported where it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from rkv_sglang.config import ARGS_VARIABLE, NO_POLICY
from rkv_sglang.integration.hooking.install import register_hooks, register_steps
from rkv_sglang.integration.hooks.flags import ARGS_HOOKS, carry_records
from rkv_sglang.integration.hooks.processes import PROCESS_HOOKS, check_before_launch, is_loaded
from rkv_sglang.integration.hooks.steps import LAST_STEP, STEP_HOOKS
from rkv_sglang.integration.startup.server_args import policy_name


def register() -> None:
    """Add the flags, and see that a policy, once asked for, is either wholly in place or refused.

    Without a policy nothing else of SGLang is touched: the process hooks and the two steps only look at the flag.
    """
    try:
        _register()
    except Exception as error:
        # SGLang logs it and serves on. With a flag, the launcher refuses; the variable may be all that asks for a
        # policy, and nobody else reads it.
        if not os.environ.get(ARGS_VARIABLE):
            raise
        print(f"{ARGS_VARIABLE} is set and the plugin cannot be loaded ({error}): mend it or unset it", file=sys.stderr)
        raise SystemExit(1) from None


def _register() -> None:
    carry_records()
    register_hooks(ARGS_HOOKS)
    # A hook makes its target's module import; only processes that already have it need it.
    register_hooks(hook for hook in PROCESS_HOOKS if is_loaded(hook))
    register_steps(STEP_HOOKS)
    _register_launch_check()


def _register_launch_check() -> None:
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    @register_resolution_hook(LAST_STEP)  # type: ignore[untyped-decorator]  # SGLang is checked as Any
    def check_as_last_step(server_args: Any, previous: Callable[[Any], None]) -> None:
        previous(server_args)
        if policy_name(server_args) != NO_POLICY:
            check_before_launch()
