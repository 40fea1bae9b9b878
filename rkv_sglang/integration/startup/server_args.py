"""The plugin's flags: SGLang's server arguments with ``--kv-policy`` and its settings added."""

import argparse
from dataclasses import fields
from typing import Any

from sglang.srt import server_args as sglang_args

from rkv_sglang.config import NO_POLICY, POLICY_FIELD, PolicyConfig
from rkv_sglang.policy_names import policy_names

GROUP_TITLE = "KV policy (rkv_sglang)"

_PARAMETERS_FIELD = "kv_policy_config"
_SETTING_OF_FIELD = {
    f"rkv_{setting.name}": setting for setting in fields(PolicyConfig) if setting.name not in ("policy", "parameters")
}
_DEFAULTS = {
    POLICY_FIELD: NO_POLICY,
    **{name: setting.default for name, setting in _SETTING_OF_FIELD.items()},
    _PARAMETERS_FIELD: "{}",
}
_HELP = {
    POLICY_FIELD: "How the private KV cache of a decoding request is bounded. 'none' leaves SGLang as it is; every "
    "other policy keeps the prompt and at most --rkv-budget plus --rkv-buffer generated tokens per layer and KV head, "
    "and chooses them in its own way: R-KV (arXiv 2505.24133), SnapKV (2404.14469), H2O (2306.14048), StreamingLLM "
    "(2309.17453), KeyDiff (2504.15364), ManifoldKV (2602.08343), LongFlow (2603.11504), at random, or as an installed "
    "package does.",
    "rkv_budget": "Generated tokens kept per layer and KV head after a compaction, the window included. More keeps "
    "more of the reasoning and takes more memory. Unit: tokens.",
    "rkv_buffer": "Generated tokens that may gather above the budget before the next compaction. Fewer take less "
    "memory and compact more often. Unit: tokens.",
    "rkv_window": "Most recent generated tokens: always kept, and their queries judge the others. Must be smaller than "
    "the budget. Unit: tokens.",
    "rkv_mix_lambda": "Weight of importance (attention received) against redundancy (likeness to other keys), from 0, "
    "redundancy alone, to 1, importance alone.",
    "rkv_kernel_size": "Width of the max-pool that spreads importance to neighbouring tokens. Odd; 1 turns it off. "
    "Unit: tokens.",
    "rkv_similarity_threshold": "Cosine similarity, from -1 to 1, above which two keys count as near-duplicates.",
    "rkv_trace": "Let requests ask for a record of their compactions with custom_params {'kv_trace': true}, as "
    "`rkv-sglang view` does. The scheduler then waits for the device at each compaction of such a request; others pay "
    "nothing.",
    _PARAMETERS_FIELD: "Parameters of the policy by name, as JSON such as '{\"mix_lambda\": 0.2}' or as the path of a "
    "JSON file. They come before the flags of the same name.",
}


class RKVServerArgs(sglang_args.ServerArgs, dict=True):  # type: ignore[misc, call-arg]  # SGLang is checked as Any
    """SGLang's ``ServerArgs`` with the policy's fields; child processes unpickle it by this name.

    The annotations are plain on purpose: SGLang makes flags of annotated fields only, so these stay out of its flat
    list and come in their own group of ``--help``.
    """

    kv_policy: str = NO_POLICY
    rkv_budget: int = PolicyConfig.budget
    rkv_buffer: int = PolicyConfig.buffer
    rkv_window: int = PolicyConfig.window
    rkv_mix_lambda: float = PolicyConfig.mix_lambda
    rkv_kernel_size: int = PolicyConfig.kernel_size
    rkv_similarity_threshold: float = PolicyConfig.similarity_threshold
    rkv_trace: bool = PolicyConfig.trace
    kv_policy_config: str | dict[str, Any] = "{}"

    # Where SGLang publishes the fields: get_memory().kv_policy and so on.
    _NS_BY_FIELD = {**sglang_args.ServerArgs._NS_BY_FIELD, **dict.fromkeys(_DEFAULTS, "memory")}  # noqa: RUF012

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add SGLang's flags to ``parser`` and, in a group of their own, the policy's."""
        # Not by SGLang's name for it: there and wherever it was imported, the plugin loader puts this class.
        super(RKVServerArgs, RKVServerArgs).add_cli_args(parser)
        group = parser.add_argument_group(GROUP_TITLE)
        for name, default in _DEFAULTS.items():
            flag = "--" + name.replace("_", "-")
            if default is False:
                group.add_argument(flag, action="store_true", help=f"{_HELP[name]} Default: {default}.")
                continue
            group.add_argument(
                flag,
                type=type(default),
                choices=policy_names() if name == POLICY_FIELD else None,
                default=default,
                help=f"{_HELP[name]} Default: {default}.",
            )


def policy_name(server_args: Any) -> str:
    """Return the policy asked for, ``"none"`` for a record of SGLang's own class."""
    return str(getattr(server_args, POLICY_FIELD, NO_POLICY))


def config_from_args(server_args: Any) -> PolicyConfig:
    """Return the validated settings of the policy; without one, the defaults, whatever the other flags say.

    Args:
        server_args: An ``RKVServerArgs``, SGLang's view of one, or the published ``get_memory()``.

    Raises:
        ValueError: The policy is unknown, cannot be loaded or does not take its parameters, or a value is out of range;
            one line that names the flag and the mend.
    """
    if policy_name(server_args) == NO_POLICY:
        return PolicyConfig(policy=NO_POLICY)
    # Here, so that processes without a policy load neither policies nor torch for them.
    from rkv_sglang.integration.startup.policy_parameters import read_parameters
    from rkv_sglang.policies import make_policy

    settings = {setting.name: getattr(server_args, name) for name, setting in _SETTING_OF_FIELD.items()}
    parameters = read_parameters(getattr(server_args, _PARAMETERS_FIELD))
    config = PolicyConfig(policy=server_args.kv_policy, parameters=parameters, **settings)
    # Only the policy itself knows whether it takes them.
    make_policy(config)
    return config
