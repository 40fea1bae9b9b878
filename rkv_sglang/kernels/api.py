"""R-KV compaction of a FlashInfer paged KV cache: one function that needs no server."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.kernels.dispatch import compact_paged
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.transfer import to_device
from rkv_sglang.policies import RKV, Policy, is_stateful, memory_numbers
from rkv_sglang.sizes.pages import pages_needed


class PageTable(NamedTuple):
    """FlashInfer's view of which pages belong to which request.

    Attributes:
        kv_indptr: Request r has the pages ``kv_indices[kv_indptr[r] : kv_indptr[r + 1]]``, ``[num_requests + 1]``,
            int32.
        kv_indices: Page ids, ``[kv_indptr[-1]]``, int32 or int64.
        kv_last_page_len: Tokens in each request's last page, ``[num_requests]``, int32.
    """

    kv_indptr: Tensor
    kv_indices: Tensor
    kv_last_page_len: Tensor


def compact_paged_kv(
    paged_kv_cache: Sequence[tuple[Tensor, Tensor]],
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_len: Tensor,
    prompt_lens: Sequence[int],
    queries: Tensor,
    *,
    budget: int | Sequence[int],
    policy: Policy | None = None,
    model: ModelAttention = PLAIN_ATTENTION,
    dtype: torch.dtype | None = None,
    key_scales: Sequence[float] | None = None,
    value_scales: Sequence[float] | None = None,
) -> PageTable:
    """Keep each request's prompt and ``budget`` of its generated tokens, chosen per layer and KV head.

    Mutates the pages of generated tokens: what is kept is packed, in temporal order, behind the prompt. Pages that only
    hold prompt are only read, so requests may share them. Requests that have generated no more than their budget are
    left as they are. Runs Triton kernels on a GPU and plain torch on a CPU. ``kv_indptr`` and ``kv_last_page_len`` are
    read on the CPU: give them there, as for FlashInfer's ``plan``, if nothing may wait for the GPU.

    Args:
        paged_kv_cache: Per layer keys and values, each ``[num_pages, page_size, num_kv_heads, head_dim]`` (NHD), bf16,
            fp16, fp32, fp8 or uint8 that holds fp8; stride 1 along head_dim. Keys after RoPE.
        kv_indptr, kv_indices, kv_last_page_len: As in ``PageTable``; ``kv_indices`` on the device of the cache.
        prompt_lens: Leading tokens of each request that are always kept and not counted.
        queries: Each request's last queries after RoPE, oldest first,
            ``[num_layers, num_requests, window, num_qo_heads, head_dim]``, bf16, fp16 or fp32. Their tokens, the most
            recent ``window`` ones, are always kept.
        budget: Generated tokens to keep, the window included, more than ``window``; one for all or one per request.
        policy: The rule that scores tokens, one without a memory of its own; default: ``RKV()``.
        model: How logits are made of products; default: times ``1 / sqrt(head_dim)``.
        dtype: What uint8 pages hold.
        key_scales, value_scales: Per layer, the factor that dequantises fp8; default: 1.

    Returns:
        The page table afterwards, on the devices of the old one. Pages that nothing is left in are not in it any more.

    Raises:
        ValueError: A shape, dtype, device or value differs from the above.

    Example:
        Two requests, pages of 4 tokens, two layers: the first keeps 6 of its 9 generated tokens.

        >>> import torch
        >>> from rkv_sglang.kernels.api import compact_paged_kv
        >>> generator = torch.Generator().manual_seed(0)
        >>> cache = [tuple(torch.randn(2, 8, 4, 2, 16, generator=generator)) for _ in range(2)]
        >>> prompt_page = cache[0][0][7].clone()
        >>> table = compact_paged_kv(
        ...     cache,
        ...     kv_indptr=torch.tensor([0, 4, 6], dtype=torch.int32),
        ...     kv_indices=torch.tensor([7, 3, 5, 0, 2, 6], dtype=torch.int32),
        ...     kv_last_page_len=torch.tensor([1, 3], dtype=torch.int32),
        ...     prompt_lens=[4, 3],
        ...     queries=torch.randn(2, 2, 2, 4, 16, generator=generator),
        ...     budget=6,
        ... )
        >>> table.kv_indptr.tolist(), table.kv_indices.tolist(), table.kv_last_page_len.tolist()
        ([0, 3, 5], [7, 3, 5, 2, 6], [2, 3])
        >>> torch.equal(cache[0][0][7], prompt_page)
        True
    """
    policy = RKV() if policy is None else policy
    if is_stateful(policy) or memory_numbers(policy, 1, 1):
        raise ValueError(f"policy {type(policy).__name__} needs what it scored before, which nothing carries here")
    if not paged_kv_cache or any(tensor.dim() != 4 for layer in paged_kv_cache for tensor in layer):
        raise ValueError("paged_kv_cache must hold keys and values of [num_pages, page_size, num_kv_heads, head_dim]")
    keys = PagedBuffers.from_tensors([layer[0] for layer in paged_kv_cache], dtype=dtype, scales=key_scales)
    values = PagedBuffers.from_tensors([layer[1] for layer in paged_kv_cache], dtype=dtype, scales=value_scales)
    table = PageTable(kv_indptr, kv_indices, kv_last_page_len)
    first_pages, kv_lens = _read_table(table, keys.page_size)
    num_requests = len(kv_lens)
    budgets = [budget] * num_requests if isinstance(budget, int) else list(budget)
    window = _check_requests(queries, kv_lens, prompt_lens, budgets)

    due = [r for r in range(num_requests) if kv_lens[r] - prompt_lens[r] > budgets[r]]
    if not due:
        return table
    due_pages = [page for r in due for page in range(first_pages[r], first_pages[r + 1])]
    batch = PagedBatch.from_pages(
        *_rebuild_table(table, [kv_lens[r] for r in due], due_pages, keys.page_size, kv_indices.device),
        page_size=keys.page_size,
        kv_lens=[kv_lens[r] for r in due],
        prompt_lens=[prompt_lens[r] for r in due],
        budgets=[budgets[r] for r in due],
        window=window,
    )
    due_queries = queries if len(due) == num_requests else queries[:, to_device(due, torch.int64, queries.device)]
    compact_paged(keys, values, batch, due_queries, policy, model=model)

    new_lens = [min(kv_lens[r], prompt_lens[r] + budgets[r]) for r in range(num_requests)]
    still_used = [
        page
        for r in range(num_requests)
        for page in range(first_pages[r], first_pages[r] + pages_needed(new_lens[r], keys.page_size))
    ]
    return _rebuild_table(table, new_lens, still_used, keys.page_size, None)


def _read_table(table: PageTable, page_size: int) -> tuple[list[int], list[int]]:
    """Return where each request's pages start, and how many tokens it has."""
    num_requests = table.kv_indptr.numel() - 1
    for name, tensor, length in (
        ("kv_indptr", table.kv_indptr, num_requests + 1),
        ("kv_last_page_len", table.kv_last_page_len, num_requests),
    ):
        if tensor.dtype != torch.int32 or list(tensor.shape) != [length] or num_requests < 1:
            raise ValueError(
                f"{name} must be int32 [{length}] for at least one request, got {tensor.dtype} {list(tensor.shape)}"
            )
    first_pages, last_lens = table.kv_indptr.tolist(), table.kv_last_page_len.tolist()
    if table.kv_indices.dim() != 1 or first_pages[0] != 0 or first_pages[-1] > table.kv_indices.numel():
        raise ValueError(
            f"kv_indptr must start at 0 and end within kv_indices {list(table.kv_indices.shape)}, got {first_pages}"
        )
    if any(a >= b for a, b in itertools.pairwise(first_pages)):
        raise ValueError(f"kv_indptr must give every request at least one page, got {first_pages}")
    if any(not 1 <= last_len <= page_size for last_len in last_lens):
        raise ValueError(f"kv_last_page_len must be between 1 and page_size {page_size}, got {last_lens}")
    num_full_pages = [b - a - 1 for a, b in itertools.pairwise(first_pages)]
    return first_pages, [n * page_size + last for n, last in zip(num_full_pages, last_lens, strict=True)]


def _check_requests(queries: Tensor, kv_lens: Sequence[int], prompt_lens: Sequence[int], budgets: Sequence[int]) -> int:
    """Return the window; the numbers of tokens of requests that are due are checked where their batch is built."""
    for name, count in (("prompt_lens", len(prompt_lens)), ("budget", len(budgets))):
        if count != len(kv_lens):
            raise ValueError(f"{name} must have one entry for each of {len(kv_lens)} requests, got {count}")
    if queries.dim() != 5 or queries.shape[1] != len(kv_lens):
        raise ValueError(
            f"queries must be [num_layers, {len(kv_lens)}, window, num_qo_heads, head_dim], got {list(queries.shape)}"
        )
    for request, (kv_len, prompt_len, budget) in enumerate(zip(kv_lens, prompt_lens, budgets, strict=True)):
        if not 0 <= prompt_len <= kv_len or budget <= queries.shape[2]:
            raise ValueError(
                f"request {request} needs 0 <= prompt_len <= {kv_len} tokens and budget > window {queries.shape[2]}, "
                f"got prompt_len {prompt_len} and budget {budget}"
            )
    return queries.shape[2]


def _rebuild_table(
    old: PageTable, kv_lens: Sequence[int], pages: Sequence[int], page_size: int, device: torch.device | None
) -> PageTable:
    """Return the table of requests of ``kv_lens`` tokens that own, in order, these places of ``old.kv_indices``."""
    indptr = [0]
    for kv_len in kv_lens:
        indptr.append(indptr[-1] + pages_needed(kv_len, page_size))
    last_lens = [(kv_len - 1) % page_size + 1 for kv_len in kv_lens]
    return PageTable(
        to_device(indptr, torch.int32, device or old.kv_indptr.device),
        old.kv_indices[to_device(pages, torch.int64, old.kv_indices.device)],
        to_device(last_lens, torch.int32, device or old.kv_last_page_len.device),
    )
