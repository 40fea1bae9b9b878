"""The servers that benchmarks compare: each a KV policy with its budget and buffer, or none."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rkv_sglang.config import NO_POLICY, PolicyConfig
from rkv_sglang.policies import default_settings, make_policy
from rkv_sglang.policies.registry import SHARED_PARAMETERS

# SGLang as published: no plugin is loaded, because none has this name.
STOCK_ENVIRONMENT = {"SGLANG_PLUGINS": "no_plugin"}


@dataclass(frozen=True)
class Setting:
    """One kind of server.

    Attributes:
        name: As it stands in results.
        config: Its policy; None without one.
        own_flags: Other flags that only this server has.
        environment: Variables that only this server has.
    """

    name: str
    config: PolicyConfig | None = None
    own_flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def policy(self) -> str:
        """The policy's name, ``"none"`` without one."""
        return NO_POLICY if self.config is None else self.config.policy

    @property
    def budget(self) -> int:
        """The policy's budget, 0 without one."""
        return 0 if self.config is None else self.config.budget

    @property
    def buffer(self) -> int:
        """The policy's buffer, 0 without one."""
        return 0 if self.config is None else self.config.buffer

    @property
    def flags(self) -> tuple[str, ...]:
        """What this server is started with, on top of the flags that all have."""
        if self.config is None:
            return self.own_flags
        sizes = ("--kv-budget", str(self.budget), "--kv-buffer", str(self.buffer))
        return (*self.own_flags, "--kv-policy", self.policy, *sizes, *_further_flags(self.config))


def as_file_name(setting_name: str) -> str:
    """Return a setting's name as it stands in names of files."""
    return setting_name.replace(":", "-").replace(", ", "-").replace(" ", "-")


def without_sizes(setting_name: str) -> str:
    """Return a setting's name without budget and buffer: the variant of a policy, over several of them."""
    policy, *words = setting_name.split(":")
    return ":".join([policy, *words[2:]])


def no_policy() -> Setting:
    """Return the setting of a server without a policy."""
    return Setting(NO_POLICY)


def policy_setting(
    policy: str, budget: int, buffer: int, name: str = "", further: Mapping[str, Any] | None = None
) -> Setting:
    """Return the setting of a server with a policy, called ``POLICY:BUDGET:BUFFER`` unless it has a name.

    Args:
        further: Other settings of ``PolicyConfig`` by name, and parameters of the policy.

    Raises:
        ValueError: There is no such policy, or a value is out of range; one line.
    """
    further = further or {}
    given = {key: value for key, value in further.items() if key in _FLAGS}
    parameters = {key: value for key, value in further.items() if key not in _FLAGS}
    sizes = {"budget": budget, "buffer": buffer}
    config = PolicyConfig(**{**default_settings(policy), **sizes, **given, "policy": policy, "parameters": parameters})
    make_policy(config)
    return Setting(name or f"{policy}:{budget}:{buffer}", config)


def parse_setting(text: str) -> Setting:
    """Return the setting that ``none`` or ``POLICY:BUDGET:BUFFER[:NAME=VALUE...]`` names.

    A name is a setting of every policy, such as window, or a parameter of this one, such as mix_lambda or seed; a value
    is a number, true, false or a word. A switch such as stagger may stand alone.

    Raises:
        ValueError: The text is neither, or there is no such server; one line.
    """
    if text == NO_POLICY:
        return no_policy()
    try:
        policy, budget, buffer, *words = text.split(":")
        further = dict(_pair(word) for word in words)
        return policy_setting(policy, int(budget), int(buffer), text, further)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the setting {text!r} is neither none nor POLICY:BUDGET:BUFFER with NAME=VALUE behind it, such as "
            f"rkv:1024:128 or rkv:1024:128:window=32:mix_lambda=0.5 ({error})"
        ) from error


# The flag of each setting of a policy but its sizes.
_FLAGS = {
    field.name: f"--{'rkv' if field.name in SHARED_PARAMETERS else 'kv'}-{field.name.replace('_', '-')}"
    for field in fields(PolicyConfig)
    if field.name not in ("policy", "budget", "buffer", "block", "parameters")
}


# Those that are on or off: their name alone turns them on.
_SWITCHES = {field.name for field in fields(PolicyConfig) if isinstance(field.default, bool)}


def _pair(word: str) -> tuple[str, Any]:
    name, sign, value = word.partition("=")
    if not sign:
        if name in _SWITCHES:
            return name, True
        raise ValueError(f"{word!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _further_flags(config: PolicyConfig) -> Iterator[str]:
    """Yield the flags of what is not as a server has it where nobody names it."""
    usual = PolicyConfig(**{**default_settings(config.policy), "policy": config.policy})
    for name, flag in _FLAGS.items():
        value = getattr(config, name)
        if value != getattr(usual, name):
            yield from [flag] if value is True else [flag, str(value)]
    if config.parameters:
        yield from ("--kv-policy-config", json.dumps(dict(config.parameters)))
