"""Policies by name: those of this package, and those that other packages bring through an entry point.

A new one here is a file, a row of ``POLICIES`` and a name in ``policy_names``. Another package adds one with an entry
point in ``GROUP``, the name of the policy on the left and its class on the right.
"""

from dataclasses import is_dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any

from rkv_sglang.config import GRANULARITIES, NO_POLICY, REQUEST, PolicyConfig
from rkv_sglang.messages import one_line, shown
from rkv_sglang.policies.base import Policy, granularities_of, is_blind
from rkv_sglang.policies.h2o import H2O
from rkv_sglang.policies.informed.beaconkv import BeaconKV
from rkv_sglang.policies.informed.gkv import GKV
from rkv_sglang.policies.informed.half import Half
from rkv_sglang.policies.informed.thinkv import ThinKV
from rkv_sglang.policies.informed.triattention import TriAttention
from rkv_sglang.policies.keydiff import KeyDiff
from rkv_sglang.policies.longflow import LongFlow
from rkv_sglang.policies.manifoldkv import ManifoldKV
from rkv_sglang.policies.parameters import check_parameters, parameter_types
from rkv_sglang.policies.random import Random
from rkv_sglang.policies.random_attention import RandomAttention
from rkv_sglang.policies.rkv import RKV
from rkv_sglang.policies.snapkv import SnapKV
from rkv_sglang.policies.streaming_llm import StreamingLLM
from rkv_sglang.policy_names import brought_policies, policy_names

POLICIES: dict[str, type[Policy]] = {
    "rkv": RKV,
    "snapkv": SnapKV,
    "h2o": H2O,
    "streaming_llm": StreamingLLM,
    "keydiff": KeyDiff,
    "manifoldkv": ManifoldKV,
    "longflow": LongFlow,
    "random": Random,
    "random_attention": RandomAttention,
    "gkv": GKV,
    "half": Half,
    "triattention": TriAttention,
    "beaconkv": BeaconKV,
    "thinkv": ThinKV,
}
# Parameters of the policies above that have a flag of their own, and so a field in the settings.
SHARED_PARAMETERS = ("mix_lambda", "kernel_size", "similarity_threshold", "buffer")


def make_policy(config: PolicyConfig) -> Policy:
    """Build the policy that ``config`` names, with ``config.parameters``.

    A policy of this package takes parameters that have a flag from the setting of the same name, unless
    ``config.parameters`` has them.

    Raises:
        ValueError: The name is ``"none"`` or unknown, its package cannot be used, or the granularity or a parameter
            does not fit; one line that names the flag.
    """
    policy_class = _find(config.policy)
    granularities = granularities_of(policy_class)
    if config.granularity not in granularities:
        raise ValueError(
            f"--kv-granularity {config.granularity} does not go with --kv-policy {config.policy}: it has not been "
            f"shown right with it; set --kv-granularity {granularities[0]}"
        )
    parameters = dict(config.parameters)
    try:
        check_parameters(policy_class, parameters)
        if config.policy in POLICIES:
            shared = [name for name in SHARED_PARAMETERS if name in parameter_types(policy_class)]
            # The settings know the ranges of these.
            settings = replace(config, **{name: parameters[name] for name in shared if name in parameters})
            parameters |= {name: getattr(settings, name) for name in shared}
        policy: Policy = policy_class(**parameters)
    # Whatever somebody's class makes of its parameters.
    except Exception as error:
        raise ValueError(f"--kv-policy-config does not fit --kv-policy {config.policy}: {_told(error)}") from None
    return policy


def looks_at_nothing(config: PolicyConfig) -> bool:
    """Return whether the policy, as it is set, needs no queries, keys or values.

    Raises:
        ValueError: The name is unknown, or its package cannot be used.
    """
    return config.granularity == REQUEST and is_blind(_find(config.policy))


def default_settings(name: str) -> dict[str, Any]:
    """Return which of ``granularity``, ``window`` and ``buffer`` that policy chooses itself where the user does not.

    Raises:
        ValueError: The name is unknown, or its package cannot be used.
    """
    policy_class = _find(name)
    own = {size: getattr(policy_class, f"default_{size}", None) for size in ("window", "buffer")}
    for size, value in own.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(
                f"--kv-policy {name!r} has a default_{size} of {shown(value)}, which is not an integer of at least 1: "
                "mend or uninstall its package"
            )
    try:
        granularities = granularities_of(policy_class)
    except TypeError:
        granularities = ()
    if not granularities or any(granularity not in GRANULARITIES for granularity in granularities):
        raise ValueError(
            f"--kv-policy {name!r} has the granularities {shown(getattr(policy_class, 'granularities', None))}, which "
            f"are not some of {', '.join(GRANULARITIES)}: mend or uninstall its package"
        )
    own["granularity"] = granularities[0]
    return {setting: value for setting, value in own.items() if value is not None}


def _find(name: str) -> type[Any]:
    brought = [point for point in brought_policies() if point.name == name]
    if name == NO_POLICY:
        raise ValueError(f"policy {name!r} scores nothing: choose one of {', '.join(policy_names()[1:])}")
    providers = ["rkv_sglang"] * (name in POLICIES) + [_package(point) for point in brought]
    if not providers:
        raise ValueError(f"--kv-policy {shown(name)} is unknown: choose one of {', '.join(policy_names())}")
    if len(providers) > 1:
        raise ValueError(f"--kv-policy {name!r} comes from {' and '.join(providers)}: choose one, uninstall the others")
    return POLICIES[name] if name in POLICIES else _load(brought[0])


def _load(point: EntryPoint) -> type[Any]:
    source = f"--kv-policy {point.name!r}, which package {_package(point)} brings as {point.value},"
    try:
        policy_class: type[Any] = point.load()
    # Whatever somebody's module raises while it is imported; one that is a script may even exit.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{source} cannot be loaded: {type(error).__name__}: {one_line(error)}; mend or uninstall that package"
        ) from None
    if not _is_policy(policy_class):
        raise ValueError(f"{source} is not a dataclass with a method score; mend or uninstall that package")
    return policy_class


def _told(error: Exception) -> str:
    # The words of these two are meant for users.
    is_meant = isinstance(error, TypeError | ValueError)
    return one_line(error) if is_meant else f"{type(error).__name__}: {one_line(error)}"


def _is_policy(found: Any) -> bool:
    try:
        return isinstance(found, type) and is_dataclass(found) and callable(getattr(found, "score", None))
    # A metaclass may do anything.
    except Exception:
        return False


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "without a name"
