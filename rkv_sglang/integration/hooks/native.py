"""SGLang's own calls of a KV policy, where the series of patches is in: what they call needs no hook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rkv_sglang.integration.hooking.hook import Hook
from rkv_sglang.integration.hooks.metrics import add_to_decode_log, report_running
from rkv_sglang.integration.hooks.model import bind_model_runner, leave_room_for_side_buffers, record_queries
from rkv_sglang.integration.hooks.restore import drop_copies_of, match_prompt_only
from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.restore import evicted_tokens_of

# Of SGLang's KV_POLICY_API; another number means that a method is not what it was.
API = 1


def host_capabilities() -> frozenset[str]:
    """Return the groups of a policy's methods that this SGLang calls by itself; none without the patches.

    Raises:
        RuntimeError: They are those of another interface; one line.
    """
    try:
        from sglang.srt.mem_cache import kv_policy
    except ImportError:
        return frozenset()
    if kv_policy.KV_POLICY_API != API:
        raise RuntimeError(
            f"this SGLang has the KV policy interface {kv_policy.KV_POLICY_API}, and this rkv_sglang was written for "
            f"{API}: take the patches out (rkv-sglang patch revert --target FOLDER) or install another rkv_sglang"
        )
    return frozenset(kv_policy.CAPABILITIES)


def without_native(hooks: Iterable[Hook], capabilities: frozenset[str]) -> tuple[Hook, ...]:
    """Return the hooks that are still needed where SGLang has some capabilities."""
    return tuple(hook for hook in hooks if hook.capability not in capabilities)


def set_native_policy() -> None:
    """Give SGLang the policy whose methods it calls. Each does what the hooks of its capability do."""
    from sglang.srt.mem_cache import kv_policy

    class NativePolicy(kv_policy.KVPolicy):  # type: ignore[misc]  # SGLang is checked as Any
        """The policy of this process, as SGLang sees it."""

        def dropped_tokens(self, batch: Any) -> Any:
            evicted = evicted_tokens_of(batch)
            return evicted if evicted.any() else None

        def side_bytes(self, configurator: Any, available: int) -> int:
            return available - leave_room_for_side_buffers(lambda *_: available, configurator, 0)

        def bind_model_runner(self, runner: Any) -> None:
            bind_model_runner(None, runner)

        def observe(self, layer: Any, q: Any, forward_batch: Any) -> None:
            record_queries(layer, q, None, None, forward_batch)

        def before_schedule(self, batch: Any) -> None:
            get_runtime().before_decode(batch)

        def max_shared_len(self, req: Any, stock: int) -> int:
            return match_prompt_only(lambda *_: stock, req, 0)

        def invalidate(self, why: str) -> None:
            drop_copies_of(why)

        def stats(self) -> dict[str, Any]:
            return get_runtime().report()

        def log_parts(self) -> list[str]:
            return add_to_decode_log([], None)

        def on_log_stats(self, collector: Any, stats: Any) -> None:
            report_running(None, collector, stats)

    kv_policy.set_kv_policy(NativePolicy())
