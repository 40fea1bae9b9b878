"""The servers that benchmarks compare: each a KV policy with its budget and buffer, or none."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rkv_sglang.config import NO_POLICY, PolicyConfig
from rkv_sglang.policies import make_policy

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
        return (*self.own_flags, "--kv-policy", self.policy, *sizes)


def no_policy() -> Setting:
    """Return the setting of a server without a policy."""
    return Setting(NO_POLICY)


def policy_setting(policy: str, budget: int, buffer: int, name: str = "") -> Setting:
    """Return the setting of a server with a policy, called ``POLICY:BUDGET:BUFFER`` unless it has a name.

    Raises:
        ValueError: There is no such policy, or a size is out of range; one line.
    """
    config = PolicyConfig(policy=policy, budget=budget, buffer=buffer)
    make_policy(config)
    return Setting(name or f"{policy}:{budget}:{buffer}", config)


def parse_setting(text: str) -> Setting:
    """Return the setting that ``none`` or ``POLICY:BUDGET:BUFFER`` names.

    Raises:
        ValueError: The text is neither, or there is no such server; one line.
    """
    if text == NO_POLICY:
        return no_policy()
    try:
        policy, budget, buffer = text.split(":")
        return policy_setting(policy, int(budget), int(buffer))
    except ValueError as error:
        raise ValueError(
            f"the setting {text!r} is neither none nor POLICY:BUDGET:BUFFER, such as rkv:1024:128 ({error})"
        ) from error
