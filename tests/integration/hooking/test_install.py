"""Hooks are applied wholly or not at all, and what is not as expected is named."""

import dataclasses
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from rkv_sglang.integration.hooking import install as installing
from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooking.install import bare_signature, install, is_applied, require_targets, target_problem
from rkv_sglang.integration.hooking.names import is_there
from rkv_sglang.integration.hooks.processes import pass_on_policy, require_policy
from rkv_sglang.integration.hooks.table import HOOKS
from rkv_sglang.integration.runtime.current import get_runtime
from tests.test_layering import imported_modules, package_sources


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
        "    def make(cls, amount: int = 3): return amount\n"
        "LIMIT = 5\n",
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


def test_every_target_of_this_sglang_is_as_expected():
    assert [problem for hook in HOOKS if (problem := target_problem(hook))] == []
    assert len({hook.target for hook in HOOKS}) == len(HOOKS)
    assert all(hook.why and hook.upstream for hook in HOOKS)


def test_every_import_of_sglang_where_a_policy_works_is_a_name_that_some_hook_uses():
    used = {name for hook in HOOKS for name in (hook.target, *hook.uses)}
    # Of a class that is imported, an attribute may stand in the table.
    used |= {name.rpartition(".")[0] for name in used}
    # How hooks are applied is no matter of any one of them.
    used.add("sglang.srt.server_args")
    imports = set()
    for module, source in package_sources().items():
        if module.startswith("rkv_sglang.integration.") and ".hooking." not in module and ".doctor." not in module:
            imports |= {name for _, name in imported_modules(module, source) if name.startswith("sglang.")}
    assert len(imports) > 20
    assert {name for name in imports if name not in used and not any(u.startswith(f"{name}.") for u in used)} == set()


def test_a_name_is_there_as_a_variable_an_attribute_and_what_objects_get(engine):
    kinds = ("signature", "Signature.bind", "Parameter._annotation", "_empty")
    assert all(is_there(f"inspect.{name}") for name in kinds)
    assert is_there("fractions.Fraction._numerator") and is_there("argparse.ArgumentParser.fromfile_prefix_chars")
    assert not any(is_there(f"inspect.{name}") for name in ("autograph", "Signature.sign", "Nothing.bind"))
    assert not is_there("no_such_engine.Part.work")


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


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (hook_on("work", "(self, amount)"), r"has the signature \(self, amount, \*, pace=1\) instead of"),
        (hook_on("rest", "(self)"), "does not exist"),
        (dataclasses.replace(hook_on("work", "(self)"), target="no_such_engine.work"), "does not exist"),
        (
            dataclasses.replace(
                hook_on("work", "(self, amount, *, pace=1)"), uses=names("fake_engine", "LIMIT CEILING")
            ),
            r"fake_engine\.CEILING, which the hook on fake_engine\.Part\.work uses, does not exist",
        ),
    ],
)
def test_a_changed_target_is_refused_and_nothing_applied(engine, hook, words):
    fine = hook_on("make", "(amount=3)")
    with pytest.raises(RuntimeError, match=words) as caught:
        install((fine, hook))
    assert "\n" not in str(caught.value) and "install sglang==" in str(caught.value)
    assert not is_applied(fine)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(installing, "version", lambda name: "0.6.0")
    with pytest.raises(RuntimeError, match=r"SGLang 0\.6\.0 is not supported.*install sglang==0\.5\.23"):
        require_targets(())


def test_signatures_are_compared_without_annotations():
    def annotated(self: object, first: int, *rest: str, last: float = 0.5, **more: object) -> None: ...

    assert bare_signature(annotated) == "(self, first, *rest, last=0.5, **more)"


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
