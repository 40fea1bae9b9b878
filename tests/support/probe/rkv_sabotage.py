"""A plugin of the tests: makes something fail in the middle of a scheduler's work, as a full memory or a bug would.

``RKV_SABOTAGE`` names what, as ``KIND@N``, with commas between several: from the N-th time on that it is done. Nothing
fails without it.

``choose``   a compaction, before it has written anything
``move``     a compaction, after its first write, to the pool or to the map
``save``     a copy to host memory: the device has no room to gather the tokens
``keep``     a copy to host memory: the host has no memory for it
``restore``  a restore: the pool has no slots
``spoil``    nothing; but a bit of what a compaction moved or copied is another one, or two tokens of a row are swapped
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

KINDS = ("choose", "move", "save", "keep", "restore", "spoil")
MESSAGE = "sabotaged on purpose"


def register() -> None:
    """Entry point, called by SGLang in every process it starts."""
    asked = os.environ.get("RKV_SABOTAGE", "")
    if not asked or multiprocessing.parent_process() is None or "sglang.srt.managers.scheduler" not in sys.modules:
        return
    for one in asked.split(","):
        kind, _, number = one.partition("@")
        if kind not in KINDS:
            raise ValueError(f"RKV_SABOTAGE {kind!r} is unknown: choose one of {', '.join(KINDS)}")
        globals()[f"_{kind}"](_Countdown(int(number or 1)))


class _Countdown:
    def __init__(self, number: int) -> None:
        self._left = number

    def is_due(self) -> bool:
        self._left -= 1
        return self._left <= 0


def _choose(countdown: _Countdown) -> None:
    from rkv_sglang.integration.runtime import drop, gather

    for module, name in ((gather, "compact_requests"), (drop, "choose_by_place"), (drop, "choose_by_scores")):
        _fail(module, name, countdown)


def _move(countdown: _Countdown) -> None:
    from rkv_sglang.cache import compact
    from rkv_sglang.integration.runtime import drop

    # Where blocks are dropped, the map is what is written.
    for module, name in ((compact, "compact_paged"), (drop, "drop_blocks")):
        _fail(module, name, countdown, is_done=True)


def _fail(module: Any, name: str, countdown: _Countdown, *, is_done: bool = False) -> None:
    """Have a function of a module fail when it is due, before it has done anything or ``is_done`` afterwards."""
    original = getattr(module, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs) if is_done else None
        if countdown.is_due():
            raise RuntimeError(MESSAGE)
        return result if is_done else original(*args, **kwargs)

    setattr(module, name, fail)


class _Full:
    """A layer of the pool from which nothing can be gathered."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def index_select(self, *args: Any) -> Any:
        import torch

        raise torch.OutOfMemoryError(MESSAGE)


def _save(countdown: _Countdown) -> None:
    from rkv_sglang.integration.runtime import restore

    original = restore.save_slots

    def fail(keys: Any, values: Any, slots: Any) -> Any:
        # The last layer's values: all else is copied by then.
        is_full = countdown.is_due()
        return original(keys, [*values[:-1], _Full(values[-1])] if is_full else values, slots)

    restore.save_slots = fail


def _keep(countdown: _Countdown) -> None:
    import torch

    from rkv_sglang.cache import host_copy

    class NoMemory:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def empty(self, *args: Any, **kwargs: Any) -> Any:
            if countdown.is_due():
                raise RuntimeError(MESSAGE)
            return torch.empty(*args, **kwargs)

    host_copy.torch = NoMemory()  # type: ignore[assignment]


def _restore(countdown: _Countdown) -> None:
    from rkv_sglang.integration.runtime import restore

    original: Callable[..., Any] = restore.alloc_slots

    def fail(batch: Any, shared: Any, saved_len: int) -> Any:
        allocator = batch.tree_cache.token_to_kv_pool_allocator
        if countdown.is_due():
            allocator.alloc = lambda need: None
        return original(batch, shared, saved_len)

    restore.alloc_slots = fail


def _spoil(countdown: _Countdown) -> None:
    from rkv_sglang.integration.runtime import drop, gather
    from rkv_sglang.integration.runtime.prompts import blocks, heads

    for module, name, spoil in (
        (gather, "compact_requests", _flip_moved),
        (drop, "drop_blocks", _swap_in_row),
        (heads, "compact_prompts", _flip_copied),
        (blocks, "copy_slots", _flip_copied_token),
    ):
        _spoil_behind(module, name, countdown, spoil)


def _spoil_behind(module: Any, name: str, countdown: _Countdown, spoil: Callable[..., None]) -> None:
    original = getattr(module, name)

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if countdown.is_due():
            spoil(*args)
        return result

    setattr(module, name, spoilt)


def _flip_moved(buffers: Any, requests: Any, *others: Any) -> None:
    _flip(buffers.values.tensors[-1].flatten(0, 1), requests[0].slots[requests[0].plan.kept_len - 1])


def _flip_copied(buffers: Any, requests: Any, new_slots: Any, *others: Any) -> None:
    _flip(buffers.values.tensors[-1].flatten(0, 1), new_slots[0][-1])


def _flip_copied_token(layers: Any, slots: Any, new_slots: Any) -> None:
    _flip(layers[-1], new_slots[-1])


def _flip(layer: Any, slot: Any) -> None:
    """Change a number by its lowest bit, for which no token becomes another one."""
    import torch

    layer[int(slot)].view(torch.uint8)[0, 0] ^= 1


def _swap_in_row(req_to_token: Any, rows: Any, plans: Any, *others: Any) -> None:
    """Swap the last two tokens of a row, which attention does not mind."""
    last = plans[0].kept_len - 1
    row = req_to_token[rows[0]]
    row[[last - 1, last]] = row[[last, last - 1]]
