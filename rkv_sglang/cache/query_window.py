"""The last ``window`` queries of the requests that are about to be compacted.

Each has a row meanwhile; ``sizes.query_rows`` says how many rows are enough. Row 0 takes the queries of all others and
is never read.
"""

from collections.abc import Callable, Hashable, Sequence

import torch

from rkv_sglang.kernels.capture import LAYERS_PER_LAUNCH, capture_queries, capture_queries_torch
from rkv_sglang.kernels.transfer import to_device


class QueryWindow:
    """A ring of queries per row, and which request has which row.

    Rows are assigned on the CPU; ``flush`` brings the assignment to the device. ``capture`` runs inside the decode
    forward: it makes no sync, allocates no lasting memory and its shapes depend on nothing but the batch size, so a
    CUDA graph can hold it.

    Attributes:
        rings: ``[num_layers, num_rows + 1, window, num_qo_heads, head_dim]``, the model's dtype.
        row_of_request: Row of each ``req_to_token`` row, ``[max_requests]``, int64; 0 where none is needed.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        window: int,
        num_qo_heads: int,
        head_dim: int,
        max_requests: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.rings = torch.zeros(num_layers, num_rows + 1, window, num_qo_heads, head_dim, dtype=dtype, device=device)
        self.row_of_request = torch.zeros(max_requests, dtype=torch.int64, device=device)
        self.window = window
        # A graph is captured once and replayed whatever is active later, so on a GPU the capture always runs.
        self.always_capture = self.rings.is_cuda
        self._free_rows = list(range(num_rows, 0, -1))
        self._row_of: dict[int, int] = {}
        self._owner_of: dict[int, Hashable] = {}
        self._changed: dict[int, int] = {}
        # Queries of the layers since the last launch.
        self._pending: list[torch.Tensor] = []
        # The one place that chooses: both do the same.
        self._capture = capture_queries if self.rings.is_cuda else capture_queries_torch

    @property
    def active(self) -> bool:
        """Whether any request has a row."""
        return bool(self._row_of)

    @property
    def num_rows(self) -> int:
        """Requests that can have a row at a time."""
        return self.rings.shape[1] - 1

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        return self.rings.nbytes + self.row_of_request.nbytes

    def has_row(self, req_pool_idx: int, owner: Hashable) -> bool:
        """Return whether ``owner`` has a row under ``req_pool_idx``."""
        return self._owner_of.get(req_pool_idx) is owner

    def acquire(self, req_pool_idx: int, owner: Hashable, is_alive: Callable[[int, Hashable], bool]) -> None:
        """Give ``owner`` a row from its next decode step on.

        Args:
            is_alive: Tells whether the owner of a ``req_pool_idx`` still runs under it; rows of those that do not are
                taken back when none is free, so nobody needs to say when a request ends.

        Raises:
            RuntimeError: Every row belongs to a living request.
        """
        self.release(req_pool_idx)
        if not self._free_rows:
            for other, other_owner in list(self._owner_of.items()):
                if not is_alive(other, other_owner):
                    self.release(other)
        if not self._free_rows:
            raise RuntimeError(
                f"all {self.num_rows} query rows are taken by running requests; please report this with the "
                "server's flags"
            )
        row = self._free_rows.pop()
        self._row_of[req_pool_idx] = row
        self._owner_of[req_pool_idx] = owner
        self._changed[req_pool_idx] = row

    def release(self, req_pool_idx: int) -> None:
        """Take the row of ``req_pool_idx`` back, if it has one."""
        row = self._row_of.pop(req_pool_idx, None)
        if row is not None:
            del self._owner_of[req_pool_idx]
            self._free_rows.append(row)
            self._changed[req_pool_idx] = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of what ``read`` returns for one request and all layers."""
        return len(self.rings) * self.rings[0, 0].nbytes

    def flush(self) -> None:
        """Bring changed assignments to the device. Call on the stream of the forward passes, before the next one."""
        if not self._changed:
            return
        indices, rows = (
            to_device(list(numbers), torch.int64, self.row_of_request.device)
            for numbers in (self._changed.keys(), self._changed.values())
        )
        self.row_of_request[indices] = rows
        self._changed.clear()

    def capture(
        self, layer: int, queries: torch.Tensor, req_pool_indices: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Take one decode step's queries of one layer; call it for every layer, in order.

        They are stored with those of the next layers, ``LAYERS_PER_LAUNCH`` at a time and at the last layer the rest.

        Args:
            layer: Index of the layer on this rank.
            queries: After RoPE, ``[bs, num_qo_heads * head_dim]`` or ``[bs, num_qo_heads, head_dim]``; not to be
                changed during this step.
            req_pool_indices: ``[bs]``; padded rows have index 0, the engine's reserved row.
            positions: Logical positions, ``[bs]``, int64.

        Raises:
            ValueError: A layer was left out, or a shape, dtype, device or stride does not fit.
        """
        first = layer - layer % LAYERS_PER_LAUNCH
        if layer == first:
            # Also forgets what a forward pass that failed half-way has left.
            self._pending = []
        self._pending.append(queries.flatten(1))
        if layer + 1 == first + LAYERS_PER_LAUNCH or layer + 1 == len(self.rings):
            if len(self._pending) != layer + 1 - first:
                raise ValueError(
                    f"of layers {first} to {layer} the queries of {len(self._pending)} came: each comes once, in order"
                )
            self._capture(
                self.rings[first : layer + 1], self.row_of_request, self._pending, req_pool_indices, positions
            )
            self._pending = []

    def read(self, requests: Sequence[tuple[int, int]], layers: slice) -> torch.Tensor:
        """Return requests' last queries, oldest first, ``[num_layers, num_requests, window, num_qo_heads, head_dim]``.

        A copy, made without a sync: what is read where is known on the CPU.

        Args:
            layers: Which of the layers.
            requests: Of each its ``req_pool_idx`` and logical length, that is, tokens seen; the newest query was
                captured at position ``logical_len - 1``.
        """
        places = [
            self._row_of[req_pool_idx] * self.window + (logical_len + step) % self.window
            for req_pool_idx, logical_len in requests
            for step in range(self.window)
        ]
        steps = self.rings[layers].flatten(1, 2)
        queries = steps.index_select(1, to_device(places, torch.int64, steps.device))
        return queries.view(len(steps), len(requests), self.window, *steps.shape[2:])
