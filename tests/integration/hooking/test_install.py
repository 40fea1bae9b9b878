"""Hooks are applied, once and around what others put there, and every process says whether they are."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from rkv_sglang.integration.hooking.hook import Hook
from rkv_sglang.integration.hooking.install import install, is_applied
from rkv_sglang.integration.hooks.processes import pass_on_policy, require_policy
from rkv_sglang.integration.runtime.current import get_runtime


def double(result: int, *args: Any, **kwargs: Any) -> int:
    """A hook for the tests."""
    return 2 * result


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module that stands for a part of SGLang, so that the real ones stay unhooked."""
    import sys

    from sglang.srt.plugins.hook_registry import HookRegistry

    module = ModuleType("fake_engine")
    exec(
        "class Part:\n"
        "    def work(self, amount: int, *, pace=1) -> int: return amount * pace\n"
        "    @classmethod\n"
        "    def make(cls, amount: int = 3): return amount\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, "fake_engine", module)
    yield module
    for target in [name for name in HookRegistry._patched if name.startswith("fake_engine")]:
        HookRegistry._patched.discard(target)


def hook_on(method: str, signature: str) -> Hook:
    return Hook(
        target=f"fake_engine.Part.{method}", kind="AFTER", function=double, signature=signature, why="-", upstream="-"
    )


def test_install_applies_once_and_sees_it(engine):
    hooks = (hook_on("work", "(self, amount, *, pace=1)"), hook_on("make", "(amount=3)"))
    assert not any(is_applied(hook) for hook in hooks)
    install(hooks)
    install(hooks)
    assert all(is_applied(hook) for hook in hooks)
    assert engine.Part().work(5, pace=2) == 20
    assert engine.Part.make() == 6


def test_install_goes_around_what_another_plugin_hooked_first(engine):
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hook = hook_on("work", "(self, amount, *, pace=1)")
    HookRegistry.register(hook.target, lambda result, *args, **kwargs: result + 1, HookType.AFTER)
    HookRegistry._apply_target(hook.target, HookRegistry._hooks.pop(hook.target))
    HookRegistry._patched.add(hook.target)
    install((hook,))
    assert engine.Part().work(5) == 12


def test_a_hook_that_does_not_take_is_named(engine, monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_apply_target", lambda target, hooks: None)
    with pytest.raises(RuntimeError, match=r"^the hook on fake_engine\.Part\.work did not take: set SGLANG_PLUGINS="):
        install((hook_on("work", "(self, amount, *, pace=1)"),))


@pytest.mark.parametrize("infos", [[{}], [{"kv_policy": "rkv"}, {}], [{"kv_policy": "none"}]])
def test_the_launcher_refuses_schedulers_that_do_not_report_the_policy(infos):
    with pytest.raises(RuntimeError, match="a scheduler process runs without it"):
        require_policy(infos)
    require_policy([{"kv_policy": "rkv"}, {"kv_policy": "rkv"}])


def test_the_controller_reports_a_policy_only_if_all_replicas_do():
    class Controller:
        _scheduler_init_infos = ({"kv_policy": "rkv"}, {"kv_policy": "rkv"})

    ready: dict[str, Any] = {}
    pass_on_policy(ready, Controller)
    assert ready == {"kv_policy": "rkv"}
    Controller._scheduler_init_infos = ({"kv_policy": "rkv"}, {})  # type: ignore[assignment]
    ready = {}
    pass_on_policy(ready, Controller)
    assert ready == {}


def test_a_hook_without_a_runtime_says_so():
    with pytest.raises(RuntimeError, match="without a KV policy"):
        get_runtime()
