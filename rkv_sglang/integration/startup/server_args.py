"""The plugin's flags: SGLang's server arguments with ``--kv-policy`` and its settings added."""

import argparse
import itertools
import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang.srt import server_args as sglang_args

from rkv_sglang.config import (
    ARGS_VARIABLE,
    GRANULARITIES,
    NO_POLICY,
    PARAMETERS_FIELD,
    POLICY_FIELD,
    REQUEST,
    PolicyConfig,
    value_problems,
)
from rkv_sglang.policy_names import policy_names

GROUP_TITLE = "KV policy (rkv_sglang)"

# The record's fields of each setting. Those of every policy have a second one, as other ports of R-KV spell it.
_FIELDS_OF_SETTING = {
    "granularity": ("kv_granularity", "rkv_granularity"),
    "budget": ("kv_budget", "rkv_budget"),
    "buffer": ("kv_buffer", "rkv_buffer"),
    "window": ("kv_window", "rkv_window"),
    "mix_lambda": ("rkv_mix_lambda",),
    "kernel_size": ("rkv_kernel_size",),
    "similarity_threshold": ("rkv_similarity_threshold",),
    "prompt_budget": ("kv_prompt_budget",),
    "stagger": ("kv_stagger", "rkv_stagger"),
    "trace": ("kv_trace", "rkv_trace"),
}
_DEFAULT_OF_SETTING = {setting.name: setting.default for setting in fields(PolicyConfig)}
_HELP = {
    POLICY_FIELD: "How the private KV cache of a decoding request is bounded. 'none' leaves SGLang as it is; every "
    "other policy keeps the prompt and at most --kv-budget plus --kv-buffer generated tokens per layer and KV head, "
    "and chooses them in its own way: R-KV (arXiv 2505.24133), SnapKV (2404.14469), H2O (2306.14048), StreamingLLM "
    "(2309.17453), KeyDiff (2504.15364), ManifoldKV (2602.08343), LongFlow (2603.11504), G-KV (2512.00504), "
    "TriAttention (2604.04921), BeaconKV (2609.04971), at random, anew at every compaction (2609.03430) or once, half "
    "by R-KV and half at random, or as an installed package does.",
    "kv_granularity": "Where the choice of what stays is made. 'head': every layer and KV head keeps tokens of its "
    "own. 'request': all of them keep the same, in blocks of 16 tokens, or of a page where it is larger; nothing is "
    "moved in the cache then, only its map is rewritten. A policy may have a default of its own.",
    "kv_budget": "Generated tokens kept per layer and KV head after a compaction, the window included. More keeps "
    "more of the reasoning and takes more memory. Unit: tokens.",
    "kv_buffer": "Generated tokens that may gather above the budget before the next compaction. Fewer take less "
    "memory and compact more often. A policy may have a default of its own. Unit: tokens.",
    "kv_window": "Most recent generated tokens: always kept, and their queries judge the others. Must be smaller than "
    "the budget. A policy may have a default of its own. Unit: tokens.",
    "rkv_mix_lambda": "Weight, 0 to 1, of attention received against redundancy (likeness to other keys); R-KV's: 0.1.",
    "rkv_kernel_size": "Odd number over which the max-pool spreads importance; 1 turns it off. Unit: tokens.",
    "rkv_similarity_threshold": "Cosine similarity, from -1 to 1, above which two keys count as near-duplicates.",
    "kv_prompt_budget": "Tokens kept of a longer prompt, once --kv-window tokens were generated; its first 4 and last "
    "--kv-window always stay. The radix cache keeps it whole, for others. 0 keeps every prompt whole. Unit: tokens.",
    "kv_stagger": "Compact each request for the first time up to --kv-buffer tokens early, by a number that its own "
    "tokens decide, so that requests that start together are not all compacted in the same step.",
    "kv_trace": "Let requests ask for a record of their compactions with custom_params {'kv_trace': true}, as "
    "`rkv-sglang view` does. Only at a compaction of such a request the scheduler waits for the device.",
    PARAMETERS_FIELD: "Parameters of the policy by name, as JSON such as '{\"mix_lambda\": 0.2}' or as the path of a "
    "JSON file. They come before the flags of the same name.",
}


class RKVServerArgs(sglang_args.ServerArgs, dict=True):  # type: ignore[misc, call-arg]  # SGLang is checked as Any
    """SGLang's ``ServerArgs`` with the policy's fields; child processes unpickle it by this name.

    The annotations are plain on purpose: SGLang makes flags of annotated fields only, so these stay out of its flat
    list and come in their own group of ``--help``.
    """

    kv_policy: str = NO_POLICY
    # None: not named, so the policy's own default holds, or else that of PolicyConfig.
    kv_granularity: str | None = None
    kv_budget: int | None = None
    kv_buffer: int | None = None
    kv_window: int | None = None
    kv_prompt_budget: int = PolicyConfig.prompt_budget
    rkv_mix_lambda: float = PolicyConfig.mix_lambda
    rkv_kernel_size: int = PolicyConfig.kernel_size
    rkv_similarity_threshold: float = PolicyConfig.similarity_threshold
    kv_stagger: bool = PolicyConfig.stagger
    kv_trace: bool = PolicyConfig.trace
    kv_policy_config: str | dict[str, Any] = "{}"
    # Second spellings.
    rkv_granularity: str | None = None
    rkv_budget: int | None = None
    rkv_buffer: int | None = None
    rkv_window: int | None = None
    rkv_stagger: bool = PolicyConfig.stagger
    rkv_trace: bool = PolicyConfig.trace

    _NS_BY_FIELD = {  # noqa: RUF012 - where SGLang publishes the fields: get_memory().kv_policy and so on
        **sglang_args.ServerArgs._NS_BY_FIELD,
        **dict.fromkeys((POLICY_FIELD, *itertools.chain(*_FIELDS_OF_SETTING.values()), PARAMETERS_FIELD), "memory"),
    }

    def __post_init__(self) -> None:
        """Take the settings that the environment holds; raises ``RefusedError`` if they are bad or given here too."""
        super().__post_init__()
        if os.environ.get(ARGS_VARIABLE):
            from rkv_sglang.integration.startup.environment import adopt_environment

            adopt_environment(self, add_policy_flags)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add SGLang's flags to ``parser`` and, in a group of their own, the policy's."""
        # Not by SGLang's name for it: there and wherever it was imported, the plugin loader puts this class.
        super(RKVServerArgs, RKVServerArgs).add_cli_args(parser)
        add_policy_flags(parser.add_argument_group(GROUP_TITLE))

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Any:
        """Make the record of parsed arguments; refuse a ``--config`` file that would pass unread and asks for a policy.

        Raises:
            RefusedError: The arguments or that file name a policy.
        """
        problem = unread_config_file(args)
        if problem and (policy_name(args) != NO_POLICY or _names_a_policy(args.config)):
            # Here, so that processes without a policy load one module less.
            from rkv_sglang.integration.startup.errors import stop

            stop(problem)
        return super().from_cli_args(args)


def add_policy_flags(group: Any) -> None:
    """Add the policy's flags alone to a parser or a group of one."""
    _add_flag(group, (POLICY_FIELD,), NO_POLICY, choices=policy_names())
    for setting, spellings in _FIELDS_OF_SETTING.items():
        options = {"choices": GRANULARITIES} if setting == "granularity" else {}
        _add_flag(group, spellings, _DEFAULT_OF_SETTING[setting], **options)
    _add_flag(group, (PARAMETERS_FIELD,), "{}")


def _add_flag(group: Any, spellings: tuple[str, ...], shown_default: Any, **options: Any) -> None:
    """Add one flag with its spellings, the first of which names its field; it stays unset unless it is given."""
    name = spellings[0]
    if shown_default is False:
        options["action"] = "store_true"
    else:
        options |= {"type": type(shown_default), "default": None if len(spellings) > 1 else shown_default}
    group.add_argument(*map(_flag, spellings), dest=name, help=f"{_HELP[name]} Default: {shown_default}.", **options)


def unread_config_file(args: argparse.Namespace) -> str | None:
    """Return one line if parsed arguments still hold a ``--config``, as where it is not given by that word alone.

    SGLang takes out only what it reads, so ``--config=FILE`` and abbreviations go by without an effect.
    """
    if not getattr(args, "config", None):
        return None
    return f"SGLang reads no file for --config={args.config}: write --config {args.config}, with a space"


def _names_a_policy(path: str) -> bool:
    try:
        text = Path(path).read_text(errors="replace")
    except (OSError, ValueError):
        return False
    return any(spelling in text for spelling in (POLICY_FIELD, _flag(POLICY_FIELD).lstrip("-")))


def has_settings(server_args: Any) -> bool:
    """Return whether a record, or a view of one, is of the class that has the policy's settings."""
    return hasattr(server_args, POLICY_FIELD)


def _settings_of(server_args: Any) -> Any:
    """Return what has the policy's settings: the record, or the environment for one of SGLang's own class."""
    if has_settings(server_args) or not os.environ.get(ARGS_VARIABLE):
        return server_args
    from rkv_sglang.integration.startup.environment import environment_settings

    spellings = [(setting, name) for setting, names in _FIELDS_OF_SETTING.items() for name in names[1:]]
    unused = {name: False if _DEFAULT_OF_SETTING[setting] is False else None for setting, name in spellings}
    settings = environment_settings(add_policy_flags)
    return SimpleNamespace(**unused, **settings, page_size=getattr(server_args, "page_size", None))


def policy_name(server_args: Any) -> str:
    """Return the policy asked for; of a record of SGLang's own class, what the environment asks for, or ``"none"``.

    Raises:
        RefusedError: What the environment asks for is bad.
    """
    name = getattr(_settings_of(server_args), POLICY_FIELD, NO_POLICY)
    if isinstance(name, str):
        return name
    from rkv_sglang.messages import shown

    # Callers in Python may give anything; it is refused later, by this name.
    return shown(name)


def config_from_args(server_args: Any) -> PolicyConfig:
    """Return the validated settings of the policy; without one, the defaults, whatever the other flags say.

    Args:
        server_args: An ``RKVServerArgs``, SGLang's view of one, or the published ``get_memory()``.

    Raises:
        ValueError: The policy is unknown, cannot be loaded or does not take its parameters, a value is out of range, or
            two spellings of a setting have different values; one line that names the flag and the mend.
    """
    config, problems = read_config(server_args)
    if config is None:
        raise ValueError(problems[0])
    return config


def read_config(server_args: Any) -> tuple[PolicyConfig | None, list[str]]:
    """Return what ``config_from_args`` does, or None and every reason for which it would refuse, one line each."""
    if policy_name(server_args) == NO_POLICY:
        return PolicyConfig(policy=NO_POLICY), []
    server_args = _settings_of(server_args)
    # Here, so that processes without a policy load neither policies nor torch for them.
    from rkv_sglang.integration.startup.policy_parameters import read_parameters
    from rkv_sglang.policies import default_settings, make_policy
    from rkv_sglang.sizes.compaction_plan import block_of_pages
    from rkv_sglang.sizes.pages import ceil_to_page

    policy, problems = server_args.kv_policy, []
    settings: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for setting in _FIELDS_OF_SETTING:
        given, problem = _given(server_args, setting)
        settings |= given
        problems += [problem] if problem else []
    try:
        if isinstance(policy, str) and policy:
            defaults = default_settings(policy)
    except ValueError as error:
        problems.append(str(error))
    try:
        parameters = read_parameters(getattr(server_args, PARAMETERS_FIELD))
    except ValueError as error:
        problems.append(str(error))
    values = {**_DEFAULT_OF_SETTING, "policy": policy, "parameters": parameters, **defaults, **settings}
    if values["granularity"] == REQUEST:
        # Unknown until SGLang has decided it, and then this is asked again.
        block = values["block"] = block_of_pages(getattr(server_args, "page_size", None) or 1)
        if "buffer" not in settings:
            values["buffer"] = ceil_to_page(values["buffer"], block)
    problems += value_problems(SimpleNamespace(**values))
    if problems:
        return None, problems
    config = PolicyConfig(**values)
    try:
        # Only the policy itself knows whether it takes its parameters.
        make_policy(config)
    except ValueError as error:
        return None, [str(error)]
    return config, []


def _given(server_args: Any, setting: str) -> tuple[dict[str, Any], str | None]:
    """Return the setting with the value that the user gave it, under whichever spelling; nothing if under none.

    Second comes the problem, if two spellings have different values.
    """
    values = {name: getattr(server_args, name) for name in _FIELDS_OF_SETTING[setting]}
    if len(values) > 1:
        # What the record has where a spelling was not used.
        unset = False if _DEFAULT_OF_SETTING[setting] is False else None
        values = {name: value for name, value in values.items() if value is not unset}
    problem = None
    if len(values) == 2:
        (first, value), (second, other) = values.items()
        if value != other:
            from rkv_sglang.messages import shown

            problem = (
                f"{_flag(first)} {shown(value)} and {_flag(second)} {shown(other)} are two spellings of one setting: "
                f"set {_flag(first)} only"
            )
    return {setting: next(iter(values.values()))} if values else {}, problem


def resolved_fields(config: PolicyConfig) -> dict[str, Any]:
    """Return the record's fields of the settings of every policy, under all spellings, as ``config`` has them."""
    return {
        name: getattr(config, setting)
        for setting, names in _FIELDS_OF_SETTING.items()
        if len(names) > 1
        for name in names
    }


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
