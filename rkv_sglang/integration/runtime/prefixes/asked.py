"""Wishes of requests about named prefixes: the field ``kv_prefix`` of ``custom_params``, read by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rkv_sglang.config import (
    BY_POLICY,
    BY_REPEAT,
    JUDGES,
    NO_POLICY,
    NUM_FIRST_KEPT,
    POLICY_FIELD,
    PREFIX_FIELD,
    PolicyConfig,
)
from rkv_sglang.messages import shown
from rkv_sglang.sizes.pages import ceil_to_page

MOST_NAME_CHARACTERS = 100
# What a request may ask for by an object, with the fields that each takes, and those that it may have besides.
ACTIONS = {"create": ("create", "length", "budget"), "delete": ("delete",), "list": ("list",)}
OPTIONS = {"create": ("judge",)}
# Fields that say of a prompt what a named prefix says otherwise.
FIELDS_BESIDE = ("kv_prompt_len", "kv_prompt_budget")


@dataclass(frozen=True)
class Asked:
    """What one request asks for.

    Attributes:
        action: To use a prefix, or what else is done with one.
        name: Its name; empty for ``"list"``.
        length: Tokens of the document, for ``"create"``.
        budget: Tokens of it that every layer and KV head keeps, for ``"create"``; where whole blocks go, at least.
        judge: Who judges the document, for ``"create"``; one of ``JUDGES``.
    """

    action: Literal["use", "create", "delete", "list"]
    name: str = ""
    length: int = 0
    budget: int = 0
    judge: str = BY_POLICY

    def num_judging(self, config: PolicyConfig) -> int:
        """Return how many tokens behind the document are needed at least, the last of the prompt."""
        return {BY_POLICY: config.window, BY_REPEAT: self.length}.get(self.judge, 1)

    def num_kept(self, config: PolicyConfig) -> int:
        """Return how many tokens of the document stay: where whole blocks go, up to a block above the budget."""
        return self.length - (self.length - self.budget) // config.block * config.block


def asked_of(custom_params: Any) -> Asked | None:
    """Return what a request asks of named prefixes; None for nothing.

    Raises:
        ValueError: The field is none of the forms that there are, or another field does not go with it; one line.
    """
    if not isinstance(custom_params, Mapping) or PREFIX_FIELD not in custom_params:
        return None
    value = custom_params[PREFIX_FIELD]
    if isinstance(value, str):
        asked = Asked("use", _name(value))
    elif isinstance(value, Mapping):
        asked = _action(value)
    else:
        raise ValueError(
            f"{PREFIX_FIELD} {shown(value)} is neither the name of a prefix nor an object: set it to a name, or to "
            f"{_forms()}"
        )
    others = [name for name in FIELDS_BESIDE if name in custom_params] if asked.action in ("use", "create") else []
    if others:
        raise ValueError(f"{PREFIX_FIELD} does not go with {' and '.join(others)}: leave one of them out")
    if asked.action == "create" and custom_params.get(POLICY_FIELD) == NO_POLICY:
        raise ValueError(
            f"{PREFIX_FIELD} is compressed by the server's policy: leave {POLICY_FIELD} {NO_POLICY!r} out to create one"
        )
    return asked


def refuse_sizes(asked: Asked, input_len: int, config: PolicyConfig, page_size: int) -> None:
    """Refuse a document or a budget that cannot be.

    Args:
        asked: To create a prefix.
        input_len: Tokens that came: the document, and behind it the task.
        config: The server's settings.
        page_size: Tokens of a page of the pool; a prefix takes whole pages.

    Raises:
        ValueError: One line that names the field, the cause and the mend.
    """
    length, budget = asked.length, asked.budget
    num_judging, left = asked.num_judging(config), max(input_len - length, 0)
    came = f"{PREFIX_FIELD} length {shown(length)} leaves {left} of the {input_len} tokens that came"
    if left < num_judging and asked.judge == BY_REPEAT:
        raise ValueError(
            f"{came} for the document again, which judges it: send the document, an instruction to repeat it, and the "
            "document again"
        )
    if left < num_judging:
        which = f"last {num_judging} (--kv-window) judge" if asked.judge == BY_POLICY else "tokens judge"
        raise ValueError(
            f"{came} for the task, whose {which} the document: set it to {max(input_len - num_judging, 0)} or less, or "
            "send a longer task"
        )
    is_of_blocks = config.block > 1
    least = config.least_prompt_budget if is_of_blocks else ceil_to_page(config.least_prompt_budget, page_size)
    if budget < least:
        blocks = f", and blocks of {config.block} go whole" if is_of_blocks else ""
        raise ValueError(
            f"{PREFIX_FIELD} budget {shown(budget)} leaves nothing to choose: the first {NUM_FIRST_KEPT} and the last "
            f"{config.window} tokens of the document always stay{blocks}; set it to {least} or more"
        )
    if is_of_blocks and length < least + config.block:
        raise ValueError(
            f"{PREFIX_FIELD} length {shown(length)} leaves no block of {config.block} tokens to be left out beside the "
            f"{least} that stay at least: send a document of {least + config.block} tokens or more"
        )
    if is_of_blocks and length % page_size != 0:
        whole = length // page_size * page_size
        raise ValueError(
            f"{PREFIX_FIELD} length {shown(length)} is no multiple of the page of {page_size} tokens (--page-size), "
            f"and whole blocks go (--kv-granularity {config.granularity}): set it to {whole}, and leave out the rest"
        )
    if not is_of_blocks and budget % page_size != 0:
        raise ValueError(
            f"{PREFIX_FIELD} budget {shown(budget)} is no multiple of the page of {page_size} tokens (--page-size): "
            f"set it to {ceil_to_page(budget, page_size)}"
        )
    if is_of_blocks and length - config.block < budget < length:
        raise ValueError(
            f"{PREFIX_FIELD} budget {shown(budget)} is less than a block of {config.block} below the length of "
            f"{shown(length)} tokens, so nothing would be left out: set it to {length - config.block} or less"
        )
    if budget >= length:
        raise ValueError(
            f"{PREFIX_FIELD} budget {shown(budget)} is not less than the length of {shown(length)} tokens, so nothing "
            "would be left out: set it lower"
        )


def refuse_other_repeat(asked: Asked, ids: Sequence[int]) -> None:
    """Refuse a prompt that is to end with its document again and does not.

    Args:
        asked: To create a prefix, of a length that ``refuse_sizes`` let pass.
        ids: Tokens that came.

    Raises:
        ValueError: One line that names the first token that differs.
    """
    length = asked.length
    if asked.judge != BY_REPEAT or ids[:length] == ids[-length:]:
        return
    first = next(i for i, (token, again) in enumerate(zip(ids, ids[-length:], strict=False)) if token != again)
    raise ValueError(
        f"{PREFIX_FIELD} judge {BY_REPEAT!r} needs the document again as the last {length} tokens, and of these token "
        f"{first} is {ids[first - length]}, in the document {ids[first]}: send the document, an instruction to repeat "
        "it, and the same tokens of the document again"
    )


def _action(value: Mapping[Any, Any]) -> Asked:
    action = next((name for name in ACTIONS if name in value), None)
    if action is None or set(value) - set(OPTIONS.get(action, ())) != set(ACTIONS[action]):
        raise ValueError(
            f"{PREFIX_FIELD} {shown(dict(value))} is none of the objects that there are: set it to {_forms()}"
        )
    if action == "list":
        if value["list"] is not True:
            raise ValueError(f"{PREFIX_FIELD} list {shown(value['list'])} is not true: set it to true")
        return Asked("list")
    name = _name(value[action])
    if action == "delete":
        return Asked("delete", name)
    for field in ("length", "budget"):
        number = value[field]
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(
                f"{PREFIX_FIELD} {field} {shown(number)} is not an integer of at least 1: set it to a number of tokens"
            )
    judge = value.get("judge", BY_POLICY)
    if judge not in JUDGES:
        raise ValueError(
            f"{PREFIX_FIELD} judge {shown(judge)} is none of {', '.join(map(repr, JUDGES))}: set it to one of them, or "
            "leave it out"
        )
    return Asked("create", name, value["length"], value["budget"], judge)


def _name(value: Any) -> str:
    name: str = value if isinstance(value, str) else ""
    if not name.isprintable() or not 1 <= len(name.strip()) <= MOST_NAME_CHARACTERS:
        raise ValueError(
            f"{PREFIX_FIELD} {shown(value)} is no name: set it to a text of 1 to {MOST_NAME_CHARACTERS} characters, "
            "all of them printable"
        )
    return name


def _forms() -> str:
    create = "{'create': NAME, 'length': TOKENS, 'budget': TOKENS} with or without a 'judge'"
    return f"{create}, {{'delete': NAME}} or {{'list': true}}"
