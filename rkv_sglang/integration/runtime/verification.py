"""Compactions with all that they do checked, where a server was started so."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rkv_sglang.cache.compact import Compacted
from rkv_sglang.cache.verify import compact_and_verify


def checked(compact: Callable[..., list[Compacted]], tree_cache: Any) -> Callable[..., list[Compacted]]:
    """Return ``compact`` with all that it does checked, what the radix tree holds now included."""
    return partial(compact_and_verify, compact, tree_cache.all_values_flatten().long())
