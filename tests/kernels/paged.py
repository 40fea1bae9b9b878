"""Lay requests out on the pages of a pool, with NaN wherever no token of theirs lies."""

import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.sizes.pages import pages_needed


def make_batch(
    rng: random.Random,
    page_size: int,
    *,
    kv_lens: Sequence[int],
    prompt_lens: Sequence[int],
    budgets: Sequence[int],
    window: int,
) -> PagedBatch:
    """A batch on pages in no order; every other page belongs to nobody, page 0 too."""
    num_pages = [pages_needed(length, page_size) for length in kv_lens]
    pages = rng.sample(range(1, 2 * sum(num_pages) + 1), sum(num_pages))
    if page_size == 1:
        slots = torch.tensor(pages, dtype=rng.choice([torch.int32, torch.int64]))
        return PagedBatch.from_slots(slots, kv_lens=kv_lens, prompt_lens=prompt_lens, budgets=budgets, window=window)
    return PagedBatch.from_pages(
        torch.tensor([0, *itertools.accumulate(num_pages)], dtype=torch.int32),
        torch.tensor(pages, dtype=rng.choice([torch.int32, torch.int64])),
        torch.tensor([(length - 1) % page_size + 1 for length in kv_lens], dtype=torch.int32),
        page_size=page_size,
        kv_lens=kv_lens,
        prompt_lens=prompt_lens,
        budgets=budgets,
        window=window,
    )


def places_of(batch: PagedBatch, request: int) -> tuple[Tensor, Tensor]:
    """Page and offset of every token of a request, worked out from the page table alone."""
    tokens = torch.arange(batch.kv_lens_cpu[request])
    pages = batch.kv_indices[int(batch.kv_indptr[request]) + tokens // batch.page_size]
    return pages.long(), tokens % batch.page_size


def make_pool(
    batch: PagedBatch, keys: Sequence[Sequence[Tensor]], *, heads_first: bool = False, scales: list[float] | None = None
) -> PagedBuffers:
    """A pool that holds ``keys[layer][request]``, each ``[kv_len, num_kv_heads, head_dim]``, and NaN elsewhere."""
    _, num_kv_heads, head_dim = keys[0][0].shape
    dtype = keys[0][0].dtype
    num_pages = int(batch.kv_indices.max()) + 2
    layers = []
    for requests in keys:
        shape = (num_pages, batch.page_size, num_kv_heads, head_dim)
        if heads_first:
            layer = torch.empty(num_kv_heads, num_pages, batch.page_size, head_dim, dtype=dtype).permute(1, 2, 0, 3)
        else:
            layer = torch.empty(shape, dtype=dtype)
        layer.copy_(torch.full(shape, torch.nan))
        for request, of_request in enumerate(requests):
            # Bytes are put, because fp8 cannot be indexed.
            view = layer.view(torch.uint8) if dtype.itemsize == 1 else layer
            view[places_of(batch, request)] = of_request.view(view.dtype)
        layers.append(layer)
    return PagedBuffers.from_tensors(layers, scales=scales)


def columns_of(batch: PagedBatch, request: int) -> slice:
    """Columns of a request in ragged results."""
    start = sum(batch.kv_lens_cpu[:request])
    return slice(start, start + batch.kv_lens_cpu[request])
