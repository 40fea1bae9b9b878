"""An image in a prompt: what stands in the place of its tokens, and where these are."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Image:
    """An image whose embeddings are known.

    Attributes:
        first: Place of its first token in the prompt.
        columns: Of its grid of embeddings; its rows follow from their number.
        embeddings: Row by row, ``[rows * columns, hidden_size]``.
    """

    first: int
    columns: int
    embeddings: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.embeddings)

    @property
    def delta(self) -> int:
        """By how much the positions of what follows it differ from its places."""
        return max(self.num_tokens // self.columns, self.columns) - self.num_tokens

    def put(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return embeddings of tokens, ``[n, hidden_size]``, with the image's own at its places."""
        own = (places >= self.first) & (places < self.first + self.num_tokens)
        hidden = hidden.clone()
        hidden[own] = self.embeddings[places[own] - self.first]
        return hidden

    def positions_of(self, places: torch.Tensor) -> torch.Tensor:
        """Return the three numbers of the position at each place, ``[3, n]``: of time, row and column."""
        number = places - self.first
        in_image = self.first + torch.stack([number * 0, number // self.columns, number % self.columns])
        positions = torch.where(number < self.num_tokens, in_image, places + self.delta)
        return torch.where(number < 0, places, positions)
