"""Hook rows that add the policy's flags to SGLang's server arguments, and how these reach other processes."""

import copyreg
import multiprocessing
from typing import Any

from rkv_sglang.config import NO_POLICY
from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import ENVS, HOOK_REGISTRY, SERVER_ARGS
from rkv_sglang.integration.startup.server_args import RKVServerArgs, policy_name


def carry_records() -> None:
    """See that records of server arguments reach other processes with the policy's settings and with the plugin.

    A record of SGLang's own class, made before the plugin took that class's place, could not be pickled by its name
    any more.
    """
    for kind in (RKVServerArgs, *RKVServerArgs.__mro__[1:2]):
        copyreg.pickle(kind, _reduce_record)


def _reduce_record(server_args: Any) -> tuple[Any, ...]:
    _, (_, fields, bookkeeping) = server_args.__reduce__()
    return rebuild_record, (fields, bookkeeping)


def rebuild_record(fields: dict[str, Any], bookkeeping: dict[str, Any]) -> Any:
    """Rebuild a record in another process; with a policy, install there what a tokenizer worker needs of the plugin.

    Such a worker loads no plugins. Processes that get the record as they are spawned do, and other plugins come first
    there.

    Raises:
        RuntimeError: This process has another SGLang than the one that sent the record, or a hook did not take.
    """
    from sglang.srt.server_args import _rebuild_server_args

    record = _rebuild_server_args(RKVServerArgs, fields, bookkeeping)
    is_spawned_with_it = getattr(multiprocessing.current_process(), "_inheriting", False)
    if policy_name(record) != NO_POLICY and not is_spawned_with_it:
        from rkv_sglang.integration.hooks.processes import install_answer_hooks

        install_answer_hooks()
    return record


# A record's signature is its list of fields, hundreds of them; rows that replace the class compare no signature.
ARGS_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.server_args.ServerArgs",
        kind="REPLACE",
        function=RKVServerArgs,
        signature="",
        why="There would be no --kv-policy, neither in argv nor in a --config file.",
        upstream="Fields kv_* and rkv_* in arg_groups/fields/memory.py.",
        uses=(
            *names(SERVER_ARGS, "_NS_BY_FIELD __post_init__ __reduce__ add_cli_args"),
            "sglang.srt.server_args._rebuild_server_args",
            # How this and every other hook is applied.
            *names(HOOK_REGISTRY, "HookRegistry HookSource HookType"),
            *names(f"{HOOK_REGISTRY}.HookRegistry", "_apply_target _patched register"),
            f"{ENVS}.SGLANG_PLUGINS",
        ),
        surroundings=("sglang.srt.plugins.load_plugins", f"{HOOK_REGISTRY}.HookRegistry.apply_hooks"),
    ),
    Hook(
        target="sglang.srt.entrypoints.engine.Engine.server_args_class",
        kind="REPLACE",
        function=RKVServerArgs,
        signature="",
        why="sglang.Engine keeps the class it was defined with, so Engine(kv_policy=...) would be an unknown argument.",
        upstream="Engine looks the class up when it is made; not needed once the fields are SGLang's own.",
    ),
)
