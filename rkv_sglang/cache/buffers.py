"""The KV pool as the policies see it: one key and one value buffer a layer."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVBuffers:
    """Views of a paged KV pool in NHD layout; nothing is copied.

    Attributes:
        keys: Per layer ``[num_slots, num_kv_heads, head_dim]``, as cached (after RoPE), in the storage dtype.
        values: Per layer ``[num_slots, num_kv_heads, v_head_dim]``.
        dtype: What the bytes mean; differs from the storage dtype for fp8, which is stored as uint8.
        key_scales: Per layer, the factor that dequantises fp8 keys; 1.0 otherwise.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    dtype: torch.dtype
    key_scales: list[float]

    @property
    def num_layers(self) -> int:
        """Layers of this rank."""
        return len(self.keys)

    def gather_keys(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Return the keys in ``slots`` ([L], int64), dequantised, ``[L, num_kv_heads, head_dim]`` fp32. A copy."""
        keys = self.keys[layer][slots]
        if keys.dtype != self.dtype:
            keys = keys.view(self.dtype)
        return keys.float() * self.key_scales[layer]
