"""The part of an engine's bookkeeping that a compaction reads and changes: its index map, the lengths of its batch."""

import itertools
from collections.abc import Sequence

import torch

from rkv_sglang.cache.query_window import QueryWindow
from rkv_sglang.kernels.transfer import to_device
from rkv_sglang.kernels.warmup import NUM_REQUESTS


def read_slots(req_to_token: torch.Tensor, rows: Sequence[int], lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Copy the first slots of some rows of the index map, by one index operation whatever their number; no sync.

    Args:
        req_to_token: ``[max_requests, max_len]``, int32, contiguous.
        rows: Of each request its row.
        lengths: Of each request its tokens, at least 1.

    Returns:
        Per request ``[length]``, int64; views of one tensor.
    """
    starts = itertools.accumulate(lengths, initial=0)
    # Where its row starts in the map, less where it starts in the result.
    shifts = [row * req_to_token.shape[1] - start for row, start in zip(rows, starts, strict=False)]
    numbers = to_device([*shifts, *lengths], torch.int64, req_to_token.device).view(2, len(rows))
    total = sum(lengths)
    places = torch.repeat_interleave(numbers[0], numbers[1], output_size=total)
    places += torch.arange(total, device=places.device)
    return torch.split(req_to_token.view(-1)[places].to(torch.int64), list(lengths))


def subtract_evicted(
    seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, evicted: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch's lengths less what was evicted; no sync.

    New tensors: results still in flight hold the old ones.

    Args:
        seq_lens, seq_lens_cpu: ``[bs]``, int64, on the device and on the CPU.
        evicted: Tokens evicted of each request of the batch.
    """
    on_device = to_device(evicted, seq_lens.dtype, seq_lens.device)
    return seq_lens - on_device, seq_lens_cpu - torch.tensor(evicted, dtype=seq_lens_cpu.dtype)


def warm_up_step(query_window: QueryWindow, req_to_token: torch.Tensor) -> None:
    """Run all of the above, and what a compaction asks of the query window, once: a GPU loads code at its first use.

    Afterwards all is as before; no request may run meanwhile, nor any forward pass.

    Args:
        query_window: No row of it may be taken.
        req_to_token: As in ``read_slots``; only read.
    """
    everything, owner = slice(None), object()
    query_window.acquire(0, owner, lambda req_pool_idx, other: other is owner)
    query_window.flush()
    for num_requests in NUM_REQUESTS:
        query_window.read([(0, query_window.window)] * num_requests, everything)
        read_slots(req_to_token, [0] * num_requests, [1] * num_requests)
        lengths = torch.ones(num_requests, dtype=torch.int64)
        subtract_evicted(lengths.to(req_to_token.device), lengths, [1] * num_requests)
    query_window.release(0)
    query_window.flush()
