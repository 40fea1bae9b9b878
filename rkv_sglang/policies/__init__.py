"""The policies by name. A new one is a file here, a row below and a name in ``config.POLICY_NAMES``."""

from collections.abc import Callable

from rkv_sglang.config import PolicyConfig
from rkv_sglang.policies.base import Policy, ScoreInputs
from rkv_sglang.policies.rkv import RKV

__all__ = ["POLICIES", "RKV", "Policy", "ScoreInputs", "make_policy"]


def _make_rkv(config: PolicyConfig) -> Policy:
    return RKV(
        mix_lambda=config.mix_lambda,
        kernel_size=config.kernel_size,
        similarity_threshold=config.similarity_threshold,
    )


POLICIES: dict[str, Callable[[PolicyConfig], Policy]] = {"rkv": _make_rkv}


def make_policy(config: PolicyConfig) -> Policy:
    """Build the policy that ``config`` names.

    Raises:
        ValueError: ``config.policy`` is ``"none"`` or has no row in ``POLICIES``.
    """
    if config.policy not in POLICIES:
        raise ValueError(f"policy {config.policy!r} scores nothing: choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[config.policy](config)
