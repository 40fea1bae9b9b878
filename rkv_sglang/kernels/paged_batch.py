"""Arguments of every kernel: the due requests of one compaction, and the layers of a paged pool.

The paging convention is FlashInfer's: request ``r`` owns the pages
``kv_indices[kv_indptr[r] : kv_indptr[r + 1]]``, and its token ``t`` lies in page
``kv_indices[kv_indptr[r] + t // page_size]`` at offset ``t % page_size``. SGLang's pool of slots is the case
``page_size == 1``. Every size that a grid or an allocation needs is known on the CPU, so no kernel waits for the GPU.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_sglang.kernels.transfer import sent, to_device
from rkv_sglang.sizes.pages import pages_needed

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
KEY_DTYPES = (torch.bfloat16, torch.float16, torch.float32, *FP8_DTYPES)
MAX_HEAD_DIM = 256
# The widest load of a thread.
VECTOR_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """The requests of one compaction. Build one with ``from_slots`` or ``from_pages``.

    Attributes:
        kv_indptr: Request r's pages are ``kv_indices[kv_indptr[r] : kv_indptr[r + 1]]``, ``[num_requests + 1]``, int32.
        kv_indices: Page ids, int32 or int64, one dimension.
        kv_last_page_len: Tokens in each request's last page, ``[num_requests]``, int32.
        page_size: Tokens in a page, at least 1.
        token_indptr: Request r's columns in ragged results are ``token_indptr[r]`` to ``token_indptr[r + 1]``,
            ``[num_requests + 1]``, int64.
        prompt_lens: Leading tokens that are kept anyway and not counted, ``[num_requests]``, int32.
        budgets: Generated tokens to keep, the window included, ``[num_requests]``, int32.
        kv_lens_cpu, prompt_lens_cpu, budgets_cpu: The same on the CPU; ``kv_lens_cpu`` counts resident tokens.
        window: Most recent tokens, always kept.
    """

    kv_indptr: Tensor
    kv_indices: Tensor
    kv_last_page_len: Tensor
    page_size: int
    token_indptr: Tensor
    prompt_lens: Tensor
    budgets: Tensor
    kv_lens_cpu: tuple[int, ...]
    prompt_lens_cpu: tuple[int, ...]
    budgets_cpu: tuple[int, ...]
    window: int

    @property
    def num_requests(self) -> int:
        """Requests in the batch."""
        return len(self.kv_lens_cpu)

    @property
    def num_tokens(self) -> int:
        """Resident tokens of all requests: columns of a ragged result."""
        return sum(self.kv_lens_cpu)

    @property
    def max_kv_len(self) -> int:
        """Resident tokens of the longest request."""
        return max(self.kv_lens_cpu)

    @property
    def max_budget(self) -> int:
        """Largest budget: columns of ``kept_indices``."""
        return max(self.budgets_cpu)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.kv_indices.device

    @classmethod
    def from_slots(
        cls, slots: Tensor, *, kv_lens: Sequence[int], prompt_lens: Sequence[int], budgets: Sequence[int], window: int
    ) -> "PagedBatch":
        """Build the batch of a pool of slots (``page_size`` 1). One host-to-device copy, no sync.

        Args:
            slots: Slots of every resident token, request after request, temporal order, ``[sum(kv_lens)]``, int64 or
                int32. Kept, not copied.
            kv_lens: Resident tokens of each request.
            prompt_lens: Leading tokens of each request that are kept anyway.
            budgets: Generated tokens to keep of each request, the window included.
            window: Most recent tokens, always kept.

        Raises:
            ValueError: A shape, dtype or number does not fit.
        """
        if slots.dim() != 1 or slots.numel() != sum(kv_lens):
            raise ValueError(f"slots must be [{sum(kv_lens)}], the sum of kv_lens, got {list(slots.shape)}")
        return cls._build(slots, None, 1, (kv_lens, prompt_lens, budgets), window)

    @classmethod
    def from_pages(
        cls,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_last_page_len: Tensor,
        *,
        page_size: int,
        kv_lens: Sequence[int],
        prompt_lens: Sequence[int],
        budgets: Sequence[int],
        window: int,
    ) -> "PagedBatch":
        """Build the batch from FlashInfer's page table. One host-to-device copy, no sync.

        The values of the three tensors cannot be held against ``kv_lens`` without waiting for the GPU: that they
        agree is the caller's word.

        Args:
            kv_indptr: ``[num_requests + 1]``, int32, as are all three on one device.
            kv_indices: Page ids, ``[at least all pages of kv_lens]``, int32 or int64.
            kv_last_page_len: ``[num_requests]``, int32.
            page_size: Tokens in a page.
            kv_lens, prompt_lens, budgets, window: As in ``from_slots``.

        Raises:
            ValueError: A shape, dtype, device or number does not fit.
        """
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        lengths = {"kv_indptr": (kv_indptr, len(kv_lens) + 1), "kv_last_page_len": (kv_last_page_len, len(kv_lens))}
        for name, (tensor, length) in lengths.items():
            if (tensor.dtype, tensor.device, list(tensor.shape)) != (torch.int32, kv_indices.device, [length]):
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                raise ValueError(f"{name} must be int32 [{length}] on {kv_indices.device} as kv_indices, got {got}")
        num_pages = sum(pages_needed(length, page_size) for length in kv_lens)
        if kv_indices.dim() != 1 or kv_indices.numel() < num_pages:
            raise ValueError(f"kv_indices must hold the {num_pages} pages of kv_lens, got {list(kv_indices.shape)}")
        page_table = (kv_indptr.contiguous(), kv_last_page_len.contiguous())
        return cls._build(kv_indices, page_table, page_size, (kv_lens, prompt_lens, budgets), window)

    @classmethod
    def _build(
        cls,
        kv_indices: Tensor,
        page_table: tuple[Tensor, Tensor] | None,
        page_size: int,
        lens: tuple[Sequence[int], Sequence[int], Sequence[int]],
        window: int,
    ) -> "PagedBatch":
        if kv_indices.dtype not in (torch.int32, torch.int64) or not kv_indices.is_contiguous():
            raise ValueError(f"kv_indices must be contiguous int32 or int64, got {kv_indices.dtype}")
        kv_lens, prompt_lens, budgets = lens
        _check_lengths(kv_lens, prompt_lens, budgets, window)
        bs = len(kv_lens)
        # One int32 block, so that all of it crosses in one copy; the int64 part comes first and so stays aligned.
        block = torch.empty(2 * (bs + 1) + (bs + 1) + 3 * bs, dtype=torch.int32, pin_memory=kv_indices.is_cuda)
        num_pages = (pages_needed(length, page_size) for length in kv_lens)
        last_page_lens = [(length - 1) % page_size + 1 for length in kv_lens]
        block[: 2 * (bs + 1)].view(torch.int64)[:] = torch.tensor([0, *itertools.accumulate(kv_lens)])
        block[2 * (bs + 1) :] = torch.tensor(
            [0, *itertools.accumulate(num_pages), *last_page_lens, *prompt_lens, *budgets], dtype=torch.int32
        )
        block = sent(block, kv_indices.device)
        sizes = [2 * (bs + 1), bs + 1, bs, bs, bs]
        token_indptr, kv_indptr, kv_last_page_len, prompt_lens_device, budgets_device = torch.split(block, sizes)
        if page_table is not None:
            kv_indptr, kv_last_page_len = page_table
        return cls(
            kv_indptr=kv_indptr,
            kv_indices=kv_indices,
            kv_last_page_len=kv_last_page_len,
            page_size=page_size,
            token_indptr=token_indptr.view(torch.int64),
            prompt_lens=prompt_lens_device,
            budgets=budgets_device,
            kv_lens_cpu=tuple(kv_lens),
            prompt_lens_cpu=tuple(prompt_lens),
            budgets_cpu=tuple(budgets),
            window=window,
        )


def _check_lengths(kv_lens: Sequence[int], prompt_lens: Sequence[int], budgets: Sequence[int], window: int) -> None:
    """Raise ``ValueError`` unless every request can keep its budget out of its generated tokens."""
    counts = [len(kv_lens), len(prompt_lens), len(budgets)]
    if min(counts) != max(counts) or not kv_lens:
        raise ValueError(f"kv_lens, prompt_lens and budgets need one entry per request, at least one, got {counts}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    for index, (kv_len, prompt_len, budget) in enumerate(zip(kv_lens, prompt_lens, budgets, strict=True)):
        if prompt_len < 0 or not window <= budget <= kv_len - prompt_len:
            raise ValueError(
                f"request {index} needs prompt_len >= 0 and window <= budget <= kv_len - prompt_len, got "
                f"prompt_len {prompt_len}, window {window}, budget {budget}, kv_len {kv_len}"
            )


@dataclass(frozen=True, kw_only=True)
class PagedBuffers:
    """The keys or the values of all layers. Build one with ``from_tensors`` and keep it: the pointers are copied once.

    Attributes:
        tensors: Per layer ``[num_pages, page_size, num_kv_heads, head_dim]``, storage dtype; referenced, so that the
            pointers stay valid.
        pointers: Address of each layer's tensor, ``[num_layers]``, int64, on their device.
        scales: Factor that dequantises each layer, ``[num_layers]``, fp32, on their device; 1 unless fp8.
        dtype: What the bytes mean. fp8 is stored as uint8.
        stride_page, stride_slot, stride_head: In elements, the same in all layers; head_dim has stride 1.
        page_size, num_kv_heads, head_dim: Sizes.
        alignment_bytes: A power of two up to 16 that divides the address of every token's row of every head.
        first_layer, first_kv_head: Which layer and KV head of the whole model the first ones here are.
    """

    tensors: tuple[Tensor, ...]
    pointers: Tensor
    scales: Tensor
    dtype: torch.dtype
    stride_page: int
    stride_slot: int
    stride_head: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    alignment_bytes: int
    first_layer: int = 0
    first_kv_head: int = 0

    @property
    def num_layers(self) -> int:
        """Layers of this rank."""
        return len(self.tensors)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the tensors: uint8 for fp8, else ``dtype``."""
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[Tensor], *, dtype: torch.dtype | None = None, scales: Sequence[float] | None = None
    ) -> "PagedBuffers":
        """Describe one side of a pool. Nothing is copied but one pointer and one scale per layer.

        Args:
            tensors: Per layer ``[num_pages, page_size, num_kv_heads, head_dim]`` or, for page size 1,
                ``[num_slots, num_kv_heads, head_dim]``; any strides, but 1 along head_dim and the same in all layers.
            dtype: What the bytes mean, if the tensors are uint8; default: their dtype.
            scales: Factor that dequantises each layer; default: 1.

        Raises:
            ValueError: A shape, dtype, stride or device differs from the above.
        """
        if not tensors:
            raise ValueError("tensors must hold at least one layer")
        first = tensors[0]
        dtype = first.dtype if dtype is None else dtype
        if dtype not in KEY_DTYPES or (
            first.dtype != dtype and not (first.dtype == torch.uint8 and dtype in FP8_DTYPES)
        ):
            raise ValueError(f"tensors of {first.dtype} cannot be read as {dtype}: give one of bf16, fp16, fp32 or fp8")
        if first.dim() not in (3, 4) or 0 in first.shape or first.stride(-1) != 1 or first.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(
                "tensors must be [pages, page_size, heads, head_dim] or [slots, heads, head_dim], not empty, head_dim "
                f"at most {MAX_HEAD_DIM} with stride 1, got {list(first.shape)} with strides {list(first.stride())}"
            )
        traits = [(list(tensor.shape), tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]
        for layer, own in enumerate(traits):
            if own != traits[0]:
                raise ValueError(f"tensors[{layer}] is {own} and tensors[0] {traits[0]}: they must be equal")
        if scales is not None and len(scales) != len(tensors):
            raise ValueError(f"scales must have one entry per layer, {len(tensors)}, got {len(scales)}")
        if dtype in FP8_DTYPES:
            tensors = [tensor.view(torch.uint8) for tensor in tensors]
        paged = [tensor if tensor.dim() == 4 else tensor.unsqueeze(1) for tensor in tensors]
        stride_page, stride_slot, stride_head, _ = paged[0].stride()
        addresses = [tensor.data_ptr() for tensor in paged]
        steps = [stride * paged[0].element_size() for stride in (stride_page, stride_slot, stride_head)]
        alignment_bytes = math.gcd(VECTOR_BYTES, *addresses, *steps)
        return cls(
            tensors=tuple(paged),
            pointers=to_device(addresses, torch.int64, first.device),
            scales=to_device(scales or [1.0] * len(tensors), torch.float32, first.device),
            dtype=dtype,
            stride_page=stride_page,
            stride_slot=stride_slot,
            stride_head=stride_head,
            page_size=paged[0].shape[1],
            num_kv_heads=paged[0].shape[2],
            head_dim=paged[0].shape[3],
            alignment_bytes=alignment_bytes,
        )
