"""Access to the KV pool, without its types."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rkv_sglang.kernels.gathered import as_numbers
from rkv_sglang.kernels.paged_batch import PagedBuffers
from rkv_sglang.kernels.transfer import to_device


@dataclass(frozen=True)
class KVBuffers:
    """Views of a paged KV pool in NHD layout; nothing is copied.

    Attributes:
        keys: All layers, as cached (after RoPE).
        values: All layers.
    """

    keys: PagedBuffers
    values: PagedBuffers

    @classmethod
    def from_layers(
        cls,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        dtype: torch.dtype,
        key_scales: Sequence[float],
        value_scales: Sequence[float],
        first_layer: int = 0,
        first_kv_head: int = 0,
    ) -> "KVBuffers":
        """Describe a pool of slots.

        Args:
            keys: Per layer ``[num_slots, num_kv_heads, head_dim]``, in the storage dtype.
            values: Per layer ``[num_slots, num_kv_heads, v_head_dim]``.
            dtype: What the bytes mean; differs from the storage dtype for fp8, which is stored as uint8.
            key_scales, value_scales: Per layer, the factor that dequantises fp8; 1.0 otherwise.
            first_layer, first_kv_head: Which layer and KV head of the whole model the first ones here are.

        Raises:
            ValueError: The layers differ, or have a shape or dtype that the kernels do not know.
        """
        sides = (
            PagedBuffers.from_tensors(side, dtype=dtype, scales=scales)
            for side, scales in ((keys, key_scales), (values, value_scales))
        )
        return cls(*(replace(side, first_layer=first_layer, first_kv_head=first_kv_head) for side in sides))

    def set_scales(self, key_scales: Sequence[float], value_scales: Sequence[float]) -> None:
        """Take other factors of the layers, as ``from_layers`` does; written in place, on the current stream."""
        for side, scales in ((self.keys, key_scales), (self.values, value_scales)):
            side.scales.copy_(to_device(scales, torch.float32, side.device))

    def keys_of_head(self, layer: int, head: int, slots: torch.Tensor) -> torch.Tensor:
        """Return the keys of one head in some slots, dequantised, ``[len(slots), head_dim]`` fp32: a copy, no sync."""
        return as_numbers(self.keys, layer, self.keys.tensors[layer].flatten(0, 1)[:, head].index_select(0, slots))

    def of_layers(self, layers: slice) -> "KVBuffers":
        """Return the pool of some layers only, which shares their tensors with this one; waits for nothing."""
        if layers == slice(0, self.keys.num_layers):
            return self
        return KVBuffers(keys=_of_layers(self.keys, layers), values=_of_layers(self.values, layers))


def _of_layers(buffers: PagedBuffers, layers: slice) -> PagedBuffers:
    # Copies: a kernel is compiled anew for a pointer of another alignment.
    return replace(
        buffers,
        tensors=buffers.tensors[layers],
        pointers=buffers.pointers[layers].clone(),
        scales=buffers.scales[layers].clone(),
        first_layer=buffers.first_layer + (layers.start or 0),
    )
