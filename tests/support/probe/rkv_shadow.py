"""A bitwise copy of every KV slot whose contents nobody may change, and the question who holds which slot."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

# Who holds a slot: nobody, the radix tree, or a request's position (see ``private_holder``).
NOBODY = 0
TREE = -1
_POSITION_BITS = 32
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def private_holder(serial: int, start: int, end: int) -> np.ndarray:
    """Return the holder numbers of positions ``[start, end)`` of the request with this serial (1, 2, ..), int64."""
    return np.arange(start, end, dtype=np.int64) + ((serial << _POSITION_BITS) + 1)


def _as_words(buffer: torch.Tensor) -> torch.Tensor:
    """Return a view ``[num_slots, words]`` of a buffer's bits as the widest integers that fit; fewer compare faster."""
    rows = buffer.view(buffer.shape[0], -1)
    row_bytes = rows.shape[1] * rows.element_size()
    return rows.view(next(dtype for dtype in _WORDS if row_bytes % dtype.itemsize == 0))


def _reader(live: torch.Tensor) -> Callable[[Any, int], Any]:
    """Return what ``numpy.ndarray.take`` is for an array on the host."""
    return lambda rows, axis: live.index_select(axis, torch.from_numpy(rows).to(live.device)).cpu().numpy()


class PoolShadow:
    """Remembers the bytes of held slots and finds those that changed while their holder stayed the same.

    A slot may change hands from a request to the tree (its tokens are cached): its bytes must stay. Any other change
    of holder starts afresh. The copies live in buffers as large as the pool, but only slots that were ever held
    take memory.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], positions_may_change: bool = False) -> None:
        """Watch pools.

        Args:
            buffers: Each layer's K and V pool, first dimension the slot.
            positions_may_change: A slot that stays with its request must keep its bytes whatever position it gets.
        """
        self._positions_may_change = positions_may_change
        live = [_as_words(buffer) for buffer in buffers]
        # NumPy reads a few rows of the host's memory in a tenth of the time.
        self._read = [words.numpy().take if words.device.type == "cpu" else _reader(words) for words in live]
        self._copy = [torch.empty(words.shape, dtype=words.dtype, device="cpu").numpy() for words in live]
        self._holder = np.zeros(buffers[0].shape[0], dtype=np.int64)

    def forget_positions(self, serial: int, first: int) -> None:
        """Stop watching positions ``first`` and later of one request: its owner may rewrite them now."""
        low = (serial << _POSITION_BITS) + first + 1
        high = (serial + 1) << _POSITION_BITS
        self._holder[(self._holder >= low) & (self._holder < high)] = NOBODY

    def forget_tree(self, slots: np.ndarray) -> None:
        """Stop watching slots that the tree gives back: it may get them anew, with other contents, before a look."""
        own = slots[self._holder[slots] == TREE]
        self._holder[own] = NOBODY

    def compare(self, holder: np.ndarray) -> list[dict[str, Any]]:
        """Compare all slots whose holder stayed; stop watching the others. Returns one entry per changed slot.

        Args:
            holder: Who holds each slot, int64, ``[num_slots]``.
        """
        before = self._holder
        is_same = before == holder
        if self._positions_may_change:
            is_same |= (before > 0) & (before >> _POSITION_BITS == holder >> _POSITION_BITS)
        stayed = (before != NOBODY) & (is_same | ((holder == TREE) & (before > 0)))
        rows = np.flatnonzero(stayed)
        changed: dict[int, list[int]] = {}
        for layer, (read, copy) in enumerate(zip(self._read, self._copy, strict=True)):
            now, old = read(rows, 0), copy.take(rows, 0)
            if np.array_equal(now, old):
                continue
            for slot in rows[(now != old).any(axis=1)].tolist():
                changed.setdefault(slot, []).append(layer)
            # Reported once, not at every later step.
            copy[rows] = now
        found = [
            {"slot": slot, "buffers": buffers, "holder": describe_holder(int(before[slot]))}
            for slot, buffers in changed.items()
        ]
        self._holder = np.where(stayed, holder, NOBODY)
        return found

    def record(self, holder: np.ndarray) -> None:
        """Start watching every held slot that is not watched yet. Its contents must be written by now."""
        rows = np.flatnonzero((holder != NOBODY) & (self._holder == NOBODY))
        if rows.size == 0:
            return
        for read, copy in zip(self._read, self._copy, strict=True):
            copy[rows] = read(rows, 0)
        self._holder[rows] = holder[rows]

    def slots_of_tree(self) -> np.ndarray:
        """Return the watched slots that the tree owns, int64."""
        return np.flatnonzero(self._holder == TREE)


def describe_holder(holder: int) -> str:
    if holder == TREE:
        return "tree"
    if holder == NOBODY:
        return "nobody"
    serial, position = holder >> _POSITION_BITS, (holder & ((1 << _POSITION_BITS) - 1)) - 1
    return f"request #{serial} position {position}"
