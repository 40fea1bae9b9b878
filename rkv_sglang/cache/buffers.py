"""Access to the KV pool, without its types."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rkv_sglang.kernels.paged_batch import PagedBuffers


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
    ) -> "KVBuffers":
        """Describe a pool of slots.

        Args:
            keys: Per layer ``[num_slots, num_kv_heads, head_dim]``, in the storage dtype.
            values: Per layer ``[num_slots, num_kv_heads, v_head_dim]``.
            dtype: What the bytes mean; differs from the storage dtype for fp8, which is stored as uint8.
            key_scales, value_scales: Per layer, the factor that dequantises fp8; 1.0 otherwise.

        Raises:
            ValueError: The layers differ, or have a shape or dtype that the kernels do not know.
        """
        return cls(
            keys=PagedBuffers.from_tensors(keys, dtype=dtype, scales=key_scales),
            values=PagedBuffers.from_tensors(values, dtype=dtype, scales=value_scales),
        )

    def of_layers(self, layers: slice) -> "KVBuffers":
        """Return the pool of some layers only, which shares their tensors with this one; waits for nothing."""
        return KVBuffers(keys=_of_layers(self.keys, layers), values=_of_layers(self.values, layers))


def _of_layers(buffers: PagedBuffers, layers: slice) -> PagedBuffers:
    # Copies: a kernel is compiled anew for a pointer of another alignment.
    return replace(
        buffers,
        tensors=buffers.tensors[layers],
        pointers=buffers.pointers[layers].clone(),
        scales=buffers.scales[layers].clone(),
    )
