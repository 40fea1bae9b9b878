"""Rotary positions: which numbers of a head are turned, and how far at a position."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Turning of pairs of numbers by their position, alike in all layers. A pair is written as a complex number.

    Attributes:
        inv_freqs: By how much a position turns each pair, radians.
        factor: By how much turned queries and keys are longer (YaRN's attention factor).
        is_neox: Whether pair f is the numbers f and ``f + num_pairs`` of a head, or else ``2 f`` and ``2 f + 1``.
    """

    inv_freqs: tuple[float, ...]
    factor: float = 1.0
    is_neox: bool = True

    @property
    def num_pairs(self) -> int:
        """Pairs that are turned; the numbers of a head past them are not."""
        return len(self.inv_freqs)

    def pairs(self, vectors: Tensor) -> Tensor:
        """Return the pairs that are turned, ``[..., num_pairs]``, complex64, of ``[..., head_dim]``, floating."""
        turned = vectors[..., : 2 * self.num_pairs].float()
        if self.is_neox:
            return torch.complex(turned[..., : self.num_pairs].contiguous(), turned[..., self.num_pairs :].contiguous())
        return torch.complex(turned[..., ::2].contiguous(), turned[..., 1::2].contiguous())

    def with_pairs(self, vectors: Tensor, pairs: Tensor) -> Tensor:
        """Return ``vectors``, ``[..., head_dim]``, with other pairs, ``[..., num_pairs]``; fp32, a copy."""
        parts = [pairs.real, pairs.imag]
        turned = torch.cat(parts, dim=-1) if self.is_neox else torch.stack(parts, dim=-1).flatten(-2)
        return torch.cat([turned, vectors[..., 2 * self.num_pairs :].float()], dim=-1)

    def turns(self, positions: Sequence[int]) -> Tensor:
        """Return ``e^(i * position * inv_freq)``, ``[len(positions), num_pairs]``, complex128, on the CPU."""
        angles = torch.outer(
            torch.tensor(list(positions), dtype=torch.float64), torch.tensor(self.inv_freqs, dtype=torch.float64)
        )
        return torch.polar(torch.ones_like(angles), angles)

    def turns_on(self, positions: Sequence[int], device: torch.device, dtype: torch.dtype = torch.complex64) -> Tensor:
        """Return ``turns`` on a device; nothing waits for a GPU."""
        return _sent(self.turns(positions), device, dtype)

    def mean_turn_on(self, positions: Sequence[int], like: Tensor) -> Tensor:
        """Return the mean of ``turns``, ``[num_pairs]``, of the device and type of ``like``; nothing waits."""
        return _sent(self.turns(positions).mean(dim=0), like.device, like.dtype)


def _sent(turns: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    turns = turns.to(dtype)
    # From memory that is not pinned the CPU would wait until everything that the GPU has to do is done.
    return (turns.pin_memory() if device.type == "cuda" else turns).to(device, non_blocking=True)
