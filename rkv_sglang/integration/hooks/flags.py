"""Hook rows that add the policy's flags to SGLang's server arguments."""

from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import ENVS, HOOK_REGISTRY, SERVER_ARGS
from rkv_sglang.integration.startup.server_args import RKVServerArgs

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
            *names(SERVER_ARGS, "_NS_BY_FIELD add_cli_args"),
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
