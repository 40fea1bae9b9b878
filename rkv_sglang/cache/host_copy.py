"""A request's resident KV in host memory, while the request holds no slots of the pool."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HostCopy:
    """The bytes of some tokens, as the pool stores them; on a GPU in pinned memory where there is enough of it.

    Attributes:
        keys: ``[num_layers, num_tokens, num_kv_heads, head_dim]``, the pool's storage dtype, on the CPU.
        values: ``[num_layers, num_tokens, num_kv_heads, v_head_dim]``, the same; empty where a token has one entry.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self.keys.shape[1]


def save_slots(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], slots: torch.Tensor) -> HostCopy | None:
    """Copy what some slots hold, of all layers; None if the host has no memory for it, or the device none to gather it.

    On a GPU it is queued on the current stream. ``load_slots`` on the same stream finds it complete, and what is
    queued there later may overwrite the slots.

    Args:
        keys: Per layer ``[num_slots, num_kv_heads, head_dim]``, contiguous from the second dimension on; only read.
        values: Per layer ``[num_slots, num_kv_heads, v_head_dim]``; the same. None where a token has one entry.
        slots: In the order in which the copy holds them, ``[num_tokens]``, int64, on the pool's device.
    """
    host_keys = _host_buffer(keys, len(slots))
    host_values = None if host_keys is None else _host_buffer(values, len(slots))
    if host_keys is None or host_values is None:
        return None
    try:
        for host, layers in ((host_keys, keys), (host_values, values)):
            for layer, buffer in enumerate(layers):
                # Layer by layer: on a GPU no more than one layer's tokens are gathered at a time.
                host[layer].copy_(buffer.index_select(0, slots), non_blocking=host.is_pinned())
    except torch.OutOfMemoryError:
        return None
    return HostCopy(host_keys, host_values)


def load_slots(
    copy: HostCopy,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    slots: torch.Tensor,
    *,
    first: int,
) -> None:
    """Write the tokens from ``first`` on into slots, of all layers.

    Mutates the pool in ``slots``. On a GPU it is queued on the current stream, which must be the one of ``save_slots``.

    Args:
        slots: ``[copy.num_tokens - first]``, int64, on the pool's device; distinct.
        first: First token of the copy that is written.

    Raises:
        ValueError: The number of slots is another.
    """
    if len(slots) != copy.num_tokens - first:
        raise ValueError(f"{copy.num_tokens} tokens from {first} on do not go into {len(slots)} slots")
    for host, layers in ((copy.keys, keys), (copy.values, values)):
        for layer, buffer in enumerate(layers):
            buffer.index_copy_(0, slots, host[layer, first:].to(buffer.device, non_blocking=host.is_pinned()))


def _host_buffer(layers: Sequence[torch.Tensor], num_tokens: int) -> torch.Tensor | None:
    if not layers:
        return torch.empty(0)
    shape, dtype = (len(layers), num_tokens, *layers[0].shape[1:]), layers[0].dtype
    # Only so much memory can be pinned; the other kind is slower, and the copy then waits for the device.
    for pinned in (True, False) if layers[0].is_cuda else (False,):
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=pinned)
        except RuntimeError:
            continue
    return None
