"""``rkv-sglang doctor --details``: the hooks that a policy applies, what it can be combined with, and what not."""

from __future__ import annotations

from typing import TextIO

from rkv_sglang.config import GRANULARITIES
from rkv_sglang.integration.hooking.releases import SUPPORTED_SGLANG
from rkv_sglang.integration.hooks.table import HOOKS
from rkv_sglang.integration.startup.refused_settings import (
    ATTENTION_BACKENDS,
    DEVICES,
    KV_CACHE_DTYPES,
    REFUSED_SETTINGS,
)
from rkv_sglang.policies import policy_names
from rkv_sglang.policy_names import BLIND_NAMES


def print_details(out: TextIO | None = None) -> None:
    """Print what a server with a policy would do to SGLang and accept. Imports all that is hooked."""

    def say(text: str = "") -> None:
        print(text, file=out)

    say("\nSupported")
    for subject, values in (
        ("sglang", SUPPORTED_SGLANG),
        ("--kv-policy", policy_names()),
        ("--kv-granularity", GRANULARITIES),
        ("--device", DEVICES),
        ("--attention-backend", ATTENTION_BACKENDS),
        ("--kv-cache-dtype", KV_CACHE_DTYPES),
    ):
        say(f"  {subject:<21}{', '.join(values)}")
    say("\nHooks that a policy applies, in order (without one: only the flags and a look at them)")
    for hook in HOOKS:
        say(f"  {hook.kind:<8}{hook.target.removeprefix('sglang.')}")
    say("\nRefused with a policy, where it is set to more than its default")
    for refused in REFUSED_SETTINGS:
        served = f" (served by {', '.join(BLIND_NAMES)} with --kv-granularity request)" * refused.records_only
        say(f"  {refused.setting}: {refused.why}" + (f"; {refused.mend}" if refused.mend else "") + served)
