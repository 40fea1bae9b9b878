"""Batches with the same keys request by request, for the tests of scores, and memory that shows what is not written."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rkv_sglang.algorithm import reference
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from tests.algorithm.cases import make_keys
from tests.kernels.paged import make_batch, make_pool


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and never written shows as NaN, or as a huge integer."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned)


@dataclass
class Case:
    """A batch, its pool, and the same keys request by request."""

    batch: PagedBatch
    pool: PagedBuffers
    keys: list[list[Tensor]]
    queries: Tensor

    def expected(self, layer: int, request: int, scorer: Any = reference.rkv_scores, **settings: Any) -> Tensor:
        """The reference's scores of one layer of one request, fp64."""
        keys = self.keys[layer][request].double() * float(self.pool.scales[layer])
        return scorer(self.queries[layer, request].double(), keys, dtype=torch.float64, **settings)


def make_case(
    rng: random.Random,
    *,
    kind: str = "clustered",
    lens: list[int] | None = None,
    window: int | None = None,
    num_layers: int = 1,
    num_kv_heads: int = 2,
    gqa_group_size: int | None = None,
    head_dim: int = 64,
    page_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    threshold: float = 0.5,
    scales: tuple[float, float] = (0.3, 2.0),
) -> Case:
    """A random case; by default three requests, one of which has one token to score."""
    torch.manual_seed(rng.randrange(2**31))
    window = window or rng.randint(1, 9)
    kv_lens = lens or rng.sample([window + rng.randint(20, 60), window + 1, window + rng.randint(2, 33)], 3)
    prompt_lens = [rng.randint(0, n - window) for n in kv_lens]
    budgets = [rng.randint(window, n - p) for n, p in zip(kv_lens, prompt_lens, strict=True)]
    page_size = page_size or rng.choice([1, 1, 3, 16])
    batch = make_batch(rng, page_size, kv_lens=kv_lens, prompt_lens=prompt_lens, budgets=budgets, window=window)
    layer_scales = [rng.uniform(*scales) for _ in range(num_layers)] if dtype.itemsize == 1 else None
    keys = [
        [make_keys(kind, (n, num_kv_heads, head_dim), dtype=dtype, threshold=threshold) for n in kv_lens]
        for _ in range(num_layers)
    ]
    num_qo_heads = num_kv_heads * (gqa_group_size or rng.randint(1, 4))
    queries = torch.randn(num_layers, len(kv_lens), window, num_qo_heads, head_dim).to(
        query_dtype or (torch.float32 if dtype.itemsize == 1 else dtype)
    )
    return Case(batch, make_pool(batch, keys, heads_first=rng.random() < 0.3, scales=layer_scales), keys, queries)
