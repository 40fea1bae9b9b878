"""Statistics of a model's queries before their position turns them, one for each query head and rotated pair."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class QueryStatistics:
    """Of all layers and query heads of this rank; made once, never changed.

    Attributes:
        means: Mean of each pair, ``[num_layers, num_qo_heads, num_pairs]``, complex64.
        mean_lengths: Mean of its length, the same shape, fp32; no less than the length of the mean.

    Raises:
        ValueError: A shape or dtype differs from the above.
    """

    means: Tensor
    mean_lengths: Tensor

    def __post_init__(self) -> None:
        for name, tensor, dtype in (
            ("means", self.means, torch.complex64),
            ("mean_lengths", self.mean_lengths, torch.float32),
        ):
            if tensor.dim() != 3 or tensor.dtype != dtype or tensor.shape != self.means.shape:
                raise ValueError(
                    f"{name} must be {dtype} [num_layers, num_qo_heads, num_pairs], got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )

    def check_numbers(self) -> None:
        """Wait for the numbers and check them: once, not whenever views of them are taken.

        Raises:
            ValueError: One is not finite, or a mean is longer than the mean length.
        """
        if not self.means.isfinite().all() or not self.mean_lengths.isfinite().all():
            raise ValueError("statistics of queries must be finite numbers")
        if (self.mean_lengths < self.means.abs() * (1 - 1e-4) - 1e-6).any():
            raise ValueError("statistics of queries have a mean that is longer than the mean length")

    @property
    def num_bytes(self) -> int:
        """Bytes of both tensors."""
        return self.means.nbytes + self.mean_lengths.nbytes

    def of_layers(self, first: int, count: int) -> "QueryStatistics":
        """Return those of some layers, views."""
        return QueryStatistics(self.means[first : first + count], self.mean_lengths[first : first + count])
