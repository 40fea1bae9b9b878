"""Garbage from other packages: a policy that is none is refused in one line, whatever its entry point brings."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import pytest

from rkv_sglang import policy_names
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.startup.server_args import RKVServerArgs, read_config
from rkv_sglang.policies import make_policy
from tests.garbage.neighbours import any_value, assert_flat, assert_one_line


class Evil(type):
    """A class whose every attribute is an error."""

    def __getattribute__(cls, name: str) -> Any:
        raise RuntimeError


class EvilPolicy(metaclass=Evil):
    pass


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def scoring(**members: Any) -> type:
    """Return a dataclass that could be a policy, with members of its own."""
    return make_dataclass("Some", [("x", int, field(default=1))], namespace={"score": raising(ValueError()), **members})


class Unwritable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


ERRORS = (
    *(KeyError("x"), ZeroDivisionError(), RecursionError("deep"), ValueError("a\nb"), OSError(2, "gone")),
    *(MemoryError(), RuntimeError("two\nlines" * 1000)),
)


class Point:
    """Stands for an entry point."""

    name, value, dist = "some", "package:Some", None

    load: Callable[[], Any]


@pytest.fixture
def point(monkeypatch: pytest.MonkeyPatch) -> Point:
    """The only entry point that there is."""
    point = Point()
    monkeypatch.setattr(policy_names, "entry_points", lambda **asked: (point,))
    return point


def problems(point: Point, load: Callable[[], Any], parameters: Any = None) -> list[str]:
    point.load = load
    _, found = read_config(RKVServerArgs(model_path="m", kv_policy="some", kv_policy_config=parameters or {}))
    for problem in found:
        assert_one_line(problem)
    return found


@pytest.mark.parametrize("error", [*ERRORS, SystemExit(0), SystemExit("usage: x\ny"), SyntaxError("s"), ImportError()])
def test_a_package_that_cannot_be_imported(point: Point, error: BaseException) -> None:
    (problem,) = problems(point, raising(error))
    assert "cannot be loaded: " in problem and type(error).__name__ in problem


@pytest.mark.parametrize(
    "bring",
    [
        *(lambda: None, lambda: 5, lambda: "rkv", lambda: int, lambda: EvilPolicy, lambda: scoring()()),
        *(lambda: scoring(score=3), lambda: dataclass(type("A", (), {})), lambda: print),
    ],
)
def test_what_is_no_policy(point: Point, bring: Callable[[], Any]) -> None:
    (problem,) = problems(point, bring)
    assert "is not a dataclass with a method score" in problem


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_policy_that_cannot_be_made(point: Point, error: Exception) -> None:
    policy = scoring(__post_init__=raising(error))
    (problem,) = problems(point, lambda: policy)
    assert problem.startswith("--kv-policy-config does not fit --kv-policy some: ")


@pytest.mark.parametrize("annotation", ["no.such.Type", "1 +", "\n", 5, "list[", None, "print('x')", Unwritable()])
def test_annotations_that_are_no_types(point: Point, annotation: Any) -> None:
    policy = scoring()
    policy.__annotations__["x"] = annotation
    problems(point, lambda: policy, {"x": 3})
    problems(point, lambda: policy, {"y": 3})


def test_defaults_and_parameters_of_every_kind(point: Point, rng: random.Random) -> None:
    def some() -> None:
        names = ("default_window", "default_buffer", "granularities", "is_blind", "stateful", "needs_values")
        policy = scoring(**{name: any_value(rng) for name in names if rng.random() < 0.3})
        found = problems(point, lambda: policy, {"x": any_value(rng)} if rng.random() < 0.5 else {})
        if not found:
            assert make_policy(PolicyConfig(policy="some"))

    # Every class that is made stays known to its base until it is collected.
    assert_flat(some, times=300)
