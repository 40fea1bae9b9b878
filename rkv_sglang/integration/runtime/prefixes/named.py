"""The named prefixes of a scheduler process: who makes them, what they hold, who goes on from them."""

from __future__ import annotations

import secrets
from array import array
from dataclasses import dataclass, field
from typing import Any

from rkv_sglang.config import BY_POLICY
from rkv_sglang.integration.runtime.prefixes.judging import Judging

# A request that makes a prefix carries it under the first name, one that goes on from it under the second; under the
# third what its answer says.
MADE_ATTRIBUTE = "rkv_made_prefix"
USED_ATTRIBUTE = "rkv_used_prefix"
INFO_ATTRIBUTE = "rkv_prefix_info"


@dataclass(eq=False)
class Prefix:
    """One prefix.

    Attributes:
        name: What requests call it by.
        length: Tokens of the document, which it counts as positions.
        budget: Slots that it takes.
        ids: What stands for its slots in a request's list of tokens and in the radix tree, ``budget`` of them. They are
            the first of its document, and only of the right number.
        key: Under which the radix tree has it: no request can guess it, and one of the same name later has another.
        maker: The request whose prompt it is made of, while it is not made.
        window: Last tokens of the document that stay.
        block: Tokens of the document that go together, of all layers and heads; None: each chooses for itself.
        judge: Who judges the document, one of ``JUDGES``.
        judging: What was seen of those who do; only while it is not made.
        lock: What keeps its slots in the tree; None until it is made.
    """

    name: str
    length: int
    budget: int
    ids: array[int]
    maker: Any
    window: int
    block: int | None
    judge: str
    judging: Judging | None
    key: str = field(default_factory=lambda: f"rkv-prefix-{secrets.token_hex(16)}")
    lock: Any = None

    @property
    def gap(self) -> int:
        """Positions that it counts beyond its slots."""
        return self.length - self.budget

    @property
    def is_made(self) -> bool:
        """Whether requests may go on from it."""
        return self.lock is not None

    def finish(self, lock: Any) -> None:
        """Take the lock of its slots, and let go of what it was made from."""
        self.lock, self.maker, self.judging = lock, None, None

    def info(self) -> dict[str, Any]:
        """Return what answers say of it."""
        return {"name": self.name, "length": self.length, "budget": self.budget, "judge": self.judge}


class Prefixes:
    """All of a scheduler process, by their names. Those that are made count too: their slots are spoken for."""

    def __init__(self) -> None:
        self._by_name: dict[str, Prefix] = {}
        # By the id of the request that makes it.
        self.in_making: dict[str, Prefix] = {}

    def find(self, name: str) -> Prefix | None:
        """Return the prefix of that name, made or in the making."""
        self._forget_failed()
        return self._by_name.get(name)

    def has(self, prefix: Prefix) -> bool:
        """Return whether it is still there; one of the same name is another."""
        return self._by_name.get(prefix.name) is prefix

    def all_made(self) -> list[Prefix]:
        """Return those that can be used, in the order of their making."""
        return [prefix for prefix in self._by_name.values() if prefix.is_made]

    def all(self) -> list[Prefix]:
        """Return those in the making too."""
        return list(self._by_name.values())

    def reserve(self, prefix: Prefix) -> None:
        """Take the name; the slots are counted from now on."""
        self._by_name[prefix.name] = prefix
        self.in_making[prefix.maker.rid] = prefix

    def made(self, prefix: Prefix, rid: str, lock: Any) -> None:
        """Note that a prefix is there, in slots that the radix tree keeps for ``lock``."""
        prefix.finish(lock)
        self.in_making.pop(rid, None)

    def forget(self, prefix: Prefix) -> None:
        """Give up the name, whoever still goes on from it."""
        if self.has(prefix):
            del self._by_name[prefix.name]
        if prefix.maker is not None:
            self.in_making.pop(prefix.maker.rid, None)
            prefix.maker = prefix.judging = None

    def held_beside(self, req: Any) -> int:
        """Return how many slots all prefixes hold or will hold, but for that which ``req`` counts as its own tokens."""
        if not self._by_name:
            return 0
        self._forget_failed()
        own = used_by(req)
        return sum(prefix.budget for prefix in self._by_name.values() if prefix is not own)

    @property
    def num_judged(self) -> int:
        """Tokens of the documents whose attention is being added up."""
        return sum(prefix.length for prefix in self.in_making.values() if prefix.judge != BY_POLICY)

    def _forget_failed(self) -> None:
        """Forget those whose request ended before they were made; nobody else says so."""
        for prefix in list(self.in_making.values()):
            if prefix.maker.finished() or prefix.maker.to_finish is not None:
                self.forget(prefix)


def made_by(req: Any) -> Prefix | None:
    """Return the prefix that a request makes; None if it makes none, or none any more."""
    prefix: Prefix | None = getattr(req, MADE_ATTRIBUTE, None)
    return prefix if prefix is not None and prefix.maker is req else None


def used_by(req: Any) -> Prefix | None:
    """Return the prefix that a request goes on from."""
    prefix: Prefix | None = getattr(req, USED_ATTRIBUTE, None)
    return prefix


def unsay(req: Any) -> None:
    """Let the answer of a request that is refused say nothing of prefixes."""
    vars(req).pop(INFO_ATTRIBUTE, None)


def gap_of(req: Any) -> int:
    """Return how many positions a request counts beyond its tokens, because it goes on from a named prefix."""
    prefix = used_by(req)
    return 0 if prefix is None else prefix.gap
