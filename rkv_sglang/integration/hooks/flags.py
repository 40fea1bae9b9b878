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
    any more. A program's subclasses of that class are carried, too; those that it makes later are of the plugin's.
    """
    kinds = [_stock_class()]
    for kind in kinds:
        # Pickle asks for the very class, so each is named.
        copyreg.pickle(kind, _reduce_record)
        kinds += kind.__subclasses__()
    setattr(RKVServerArgs, "__reduce__", _reduce_record)  # noqa: B010  # mypy takes it for a method


def _reduce_record(server_args: Any) -> tuple[Any, ...]:
    stock_class = _stock_class()
    _, (kind, fields, bookkeeping) = stock_class.__reduce__(server_args)
    return rebuild_record, (None if kind in (stock_class, RKVServerArgs) else kind, fields, bookkeeping)


def _stock_class() -> Any:
    # Not kept in this module: the plugin loader puts the plugin's class wherever it finds this one.
    return RKVServerArgs.__mro__[1]


def rebuild_record(kind: type[Any] | None, fields: dict[str, Any], bookkeeping: dict[str, Any]) -> Any:
    """Rebuild a record in another process; with a policy, install there what a tokenizer worker needs of the plugin.

    Such a worker loads no plugins. Processes that get the record as they are spawned do, and other plugins come first
    there.

    Args:
        kind: A class of the program's own; None for SGLang's and the plugin's.
        fields: As SGLang's ``__reduce__`` has them.
        bookkeeping: Likewise.

    Raises:
        RuntimeError: This process has another SGLang than the one that sent the record, or a hook did not take.
    """
    from sglang.srt.server_args import _rebuild_server_args

    record = _rebuild_server_args(kind or RKVServerArgs, fields, bookkeeping)
    if policy_name(record) == NO_POLICY:
        return record
    from rkv_sglang.integration.startup.environment import CARRIED_ATTRIBUTE

    setattr(record, CARRIED_ATTRIBUTE, True)
    if not getattr(multiprocessing.current_process(), "_inheriting", False):
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
