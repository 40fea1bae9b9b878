"""Faults that a test injects on purpose, to see the probe find them."""

import os
from typing import Any

import numpy as np
import torch

_KINDS = ("flip_tree", "flip_private", "leak")


class Fault:
    """One fault, injected once, at the first scheduler step from ``step`` on where it is possible.

    ``flip_tree``: one bit of one value of a slot that the radix tree owns; ``flip_private``: the same in a slot that a
    running request owns and has written; ``leak``: a page that is allocated and never freed.
    """

    def __init__(self, kind: str, step: int) -> None:
        if kind not in _KINDS:
            raise ValueError(f"RKV_PROBE_FAULT {kind!r} is unknown: choose one of {', '.join(_KINDS)}")
        self.kind = kind
        self._step = step

    @classmethod
    def from_environment(cls) -> "Fault | None":
        kind, _, step = os.environ.get("RKV_PROBE_FAULT", "").partition("@")
        return cls(kind, int(step or 0)) if kind else None

    def is_due(self, step: int) -> bool:
        return step >= self._step

    def inject(self, allocator: Any, tree_slots: np.ndarray, written: list[np.ndarray]) -> bool:
        """Return whether it could be done now: only if there is a slot to flip, or a page to leak."""
        if self.kind == "leak":
            return allocator.alloc(allocator.page_size) is not None
        candidates = tree_slots if self.kind == "flip_tree" else np.concatenate([np.empty(0, dtype=np.int64), *written])
        if candidates.size == 0:
            return False
        # The last layer's V, and the lowest bit of one number: as small as a difference gets.
        buffer = allocator.get_kvcache().v_buffer[-1]
        slot = int(candidates[0])
        row = buffer[slot].contiguous().flatten().view(torch.uint8)
        row[0] ^= 1
        buffer[slot] = row.view(buffer.dtype).view(buffer[slot].shape)
        return True
