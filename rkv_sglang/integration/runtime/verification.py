"""Compactions with all that they do checked, where a server was started so."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from rkv_sglang.cache.compact import Compacted
from rkv_sglang.cache.verify import compact_and_verify

Compact = TypeVar("Compact", bound=Callable[..., list[Compacted]])


def checked(compact: Compact, tree_cache: Any) -> Compact:
    """Return ``compact`` with all that it does checked, what the radix tree holds now included."""
    return cast(Compact, partial(compact_and_verify, compact, tree_cache.all_values_flatten().long()))
