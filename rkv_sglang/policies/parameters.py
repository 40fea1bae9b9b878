"""Parameters of policies: what a policy class takes, and whether given values fit."""

import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from rkv_sglang.messages import shown


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ``ValueError`` unless ``value`` is ``least`` or more."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_fraction(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_calibration(questions: int, answer_tokens: int) -> None:
    """Raise ``ValueError`` unless a model can be asked so many questions, 1 to 32, for answers of that length."""
    check_at_least("questions", questions, 1)
    check_at_least("answer_tokens", answer_tokens, 1)
    if questions > 32:
        raise ValueError(f"questions must be at most 32, got {questions}")


def parameter_types(policy_class: type[Any]) -> dict[str, Any]:
    """Return the parameters of a policy, a dataclass, by name, each with its annotation."""
    try:
        hints = get_type_hints(policy_class)
    except Exception:
        # Somebody's annotations name what only a type checker imports, or are no types: the class must check its values
        # itself.
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in fields(policy_class) if field.init}


def check_parameters(policy_class: type[Any], given: Mapping[str, Any]) -> None:
    """Check the names and types of parameters; their ranges are for the class to check.

    Raises:
        ValueError: A name is unknown or missing, or a value is of another type; one line with what there is.
    """
    known = parameter_types(policy_class)
    there_are = ", ".join(f"{name} ({_type_name(kind)})" for name, kind in known.items())
    there_are = f"its parameters are {there_are}" if known else "it has no parameters"
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"there is no parameter {shown(name)}: {there_are}")
        if not _fits(value, known[name]):
            raise ValueError(f"{name} must be {_type_name(known[name])}, got {shown(value)}: {there_are}")
    for field in fields(policy_class):
        is_required = field.init and field.default is MISSING and field.default_factory is MISSING
        if is_required and field.name not in given:
            raise ValueError(f"{field.name} must be given: {there_are}")


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value read from JSON is of the annotated type; true for annotations unknown here."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if isinstance(value, bool):
        return kind not in (int, float, str, types.NoneType)
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    if kind in (int, str, bool, types.NoneType):
        return isinstance(value, kind)
    return True
