"""The shape of a hook: one row of the tables in ``hooks/``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

HookKind = Literal["BEFORE", "AFTER", "AROUND", "REPLACE", "STEP"]


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One place where the plugin meets SGLang.

    Attributes:
        target: Dotted path of the function, method or class in SGLang.
        kind: How SGLang's ``HookRegistry`` applies ``function``; ``"STEP"`` goes around a step of its resolution of
            arguments, through ``register_resolution_hook``.
        function: The hook itself; a class for ``REPLACE`` of a class.
        signature: ``str(inspect.signature(target))`` without annotations, as this release was written against. Of
            these only the parameters that ``function`` itself names are compared with another SGLang's.
        why: What would be wrong without it.
        upstream: The change in SGLang that would make it unnecessary.
        uses: Every other name of SGLang that ``function`` relies on, itself or in what it calls, as dotted paths. They
            must exist; it is also the list to go through for another SGLang.
        surroundings: Functions of SGLang that the hook neither goes around nor calls, but on whose course it counts,
            as dotted paths. They must read as they did.
        capability: Of a patched SGLang that does the same by itself, so that the hook is left out; empty for none.
    """

    target: str
    kind: HookKind
    function: Callable[..., Any]
    signature: str
    why: str
    upstream: str
    uses: tuple[str, ...] = ()
    surroundings: tuple[str, ...] = ()
    capability: str = ""


def names(owner: str, attributes: str) -> tuple[str, ...]:
    """Return the dotted paths of an owner's attributes, given with spaces between them."""
    return tuple(f"{owner}.{attribute}" for attribute in attributes.split())
