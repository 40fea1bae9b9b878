# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Pack the kept tokens of every layer and KV head to the front of each request's generated tokens, in place.

The ids of pages do not change, only what lies in them: head h's j-th kept token goes where the j-th generated token
was. Kept indices ascend, so ``kept[j] >= j``, and one program walks one (layer, head, request) from front to back in
chunks: what a chunk overwrites, no later chunk reads. No scratch copy of the cache is made.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.sizes.pages import pages_needed

# What a program holds in registers between a chunk's loads and its stores: 128 bytes for each thread.
CHUNK_BYTES = 16384
NUM_WARPS = 4
NUM_STAGES = 1
# Bytes are moved as integers of this size at most; threads join neighbours to 16-byte accesses.
WORD_DTYPES = {4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit(
    do_not_specialize=["kept_width"],
    do_not_specialize_on_alignment=["kv_indptr_ptr", "kv_indices_ptr", "prompt_lens_ptr", "budgets_ptr"],
)
def _move_kept_kernel(
    first_pointers_ptr,
    second_pointers_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    prompt_lens_ptr,
    budgets_ptr,
    kept_ptr,
    kept_width,
    PAGE_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Pack one head's kept tokens of one request, of the keys or of the values, to the front of its generated ones.

    Mutates the pool whose layers' addresses are at ``first_pointers_ptr`` (keys) or ``second_pointers_ptr`` (values).
    """
    layer = tl.program_id(0) // NUM_KV_HEADS
    head = (tl.program_id(0) % NUM_KV_HEADS).to(tl.int64)
    request = tl.program_id(1)
    pointers_ptr = first_pointers_ptr if tl.program_id(2) == 0 else second_pointers_ptr
    address = tl.load(pointers_ptr + layer)
    pages_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + request)
    prompt_len = tl.load(prompt_lens_ptr + request)
    budget = tl.load(budgets_ptr + request)
    kept_row = (layer * tl.num_programs(1) + request).to(tl.int64) * NUM_KV_HEADS + head
    kept_ptr += kept_row * kept_width

    words = tl.arange(0, BLOCK_WORDS)
    head_ptr = tl.multiple_of(address.to(tl.pointer_type(WORD)), ALIGNMENT) + head * STRIDE_HEAD
    targets = tl.arange(0, BLOCK_ROWS)
    sources = tl.load(kept_ptr + targets, mask=targets < budget, other=-1)
    for _ in range(0, budget, BLOCK_ROWS):
        # Leading tokens often stay where they are: these are neither read nor written.
        moves = sources > targets
        source_tokens = prompt_len + sources
        target_tokens = prompt_len + targets
        source_pages = tl.load(pages_ptr + source_tokens // PAGE_SIZE, mask=moves, other=0).to(tl.int64)
        target_pages = tl.load(pages_ptr + target_tokens // PAGE_SIZE, mask=moves, other=0).to(tl.int64)
        source_offsets = source_pages * STRIDE_PAGE + (source_tokens % PAGE_SIZE) * STRIDE_SLOT
        target_offsets = target_pages * STRIDE_PAGE + (target_tokens % PAGE_SIZE) * STRIDE_SLOT
        mask = moves[:, None] & (words < ROW_WORDS)[None, :]
        # [BLOCK_ROWS, BLOCK_WORDS]
        rows = tl.load(head_ptr + source_offsets[:, None] + words[None, :], mask=mask)
        next_targets = targets + BLOCK_ROWS
        # The next chunk's indices travel beside this chunk's rows.
        next_sources = tl.load(kept_ptr + next_targets, mask=next_targets < budget, other=-1)
        # A chunk's sources may be its own targets, held by other threads: nobody writes before all have read.
        tl.debug_barrier()
        tl.store(head_ptr + target_offsets[:, None] + words[None, :], rows, mask=mask)
        targets, sources = next_targets, next_sources


def _constexprs(
    *, page_size: int, num_kv_heads: int, row_bytes: int, strides_bytes: tuple[int, int, int], alignment_bytes: int
) -> dict[str, object]:
    """Return the kernel's compile-time arguments for rows of ``row_bytes``; strides of page, slot and head."""
    # Fewer than the buffers are aligned to, if a row's end is not.
    alignment_bytes = math.gcd(alignment_bytes, row_bytes)
    word_bytes = min(alignment_bytes, max(WORD_DTYPES))
    row_words = row_bytes // word_bytes
    block_words = triton.next_power_of_2(row_words)
    stride_page, stride_slot, stride_head = (stride // word_bytes for stride in strides_bytes)
    return {
        "PAGE_SIZE": page_size,
        "NUM_KV_HEADS": num_kv_heads,
        "STRIDE_PAGE": stride_page,
        "STRIDE_SLOT": stride_slot,
        "STRIDE_HEAD": stride_head,
        "ROW_WORDS": row_words,
        "BLOCK_WORDS": block_words,
        "BLOCK_ROWS": CHUNK_BYTES // (block_words * word_bytes),
        "WORD": WORD_DTYPES[word_bytes],
        "ALIGNMENT": alignment_bytes,
    }


def _constexprs_of(buffers: PagedBuffers) -> dict[str, object]:
    itemsize = buffers.storage_dtype.itemsize
    return _constexprs(
        page_size=buffers.page_size,
        num_kv_heads=buffers.num_kv_heads,
        row_bytes=buffers.head_dim * itemsize,
        strides_bytes=(
            buffers.stride_page * itemsize,
            buffers.stride_slot * itemsize,
            buffers.stride_head * itemsize,
        ),
        alignment_bytes=buffers.alignment_bytes,
    )


def move_kept_paged(keys: PagedBuffers, values: PagedBuffers, batch: PagedBatch, kept_indices: Tensor) -> None:
    """Move what every layer and KV head keeps to the front of its request's generated tokens.

    Mutates the pool in each request's tokens from ``prompt_len`` to ``prompt_len + budget``; tokens that stay where
    they are, the prompt and all others are not touched. One launch if keys and values have the same layout, else two.
    Queues no sync and allocates nothing.

    Args:
        keys, values: All layers of the pool.
        batch: Which requests, pages and budgets.
        kept_indices: Per request, layer and head the generated tokens to keep, ascending, then -1 past the request's
            budget, ``[num_layers, num_requests, num_kv_heads, max_budget]``, int32, contiguous.

    Raises:
        ValueError: A shape, dtype, device or page size differs from the above.

    Reference: ``move_kept_torch``.
    """
    check_move(keys, values, batch, kept_indices)
    key_constexprs, value_constexprs = _constexprs_of(keys), _constexprs_of(values)
    if key_constexprs == value_constexprs:
        launches = [(keys.pointers, values.pointers, 2, key_constexprs)]
    else:
        launches = [
            (keys.pointers, keys.pointers, 1, key_constexprs),
            (values.pointers, values.pointers, 1, value_constexprs),
        ]
    for first_pointers, second_pointers, num_sides, constexprs in launches:
        _move_kept_kernel[(keys.num_layers * keys.num_kv_heads, batch.num_requests, num_sides)](
            first_pointers,
            second_pointers,
            batch.kv_indptr,
            batch.kv_indices,
            batch.prompt_lens,
            batch.budgets,
            kept_indices,
            kept_indices.shape[3],
            **constexprs,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )


def move_kept_torch(keys: PagedBuffers, values: PagedBuffers, batch: PagedBatch, kept_indices: Tensor) -> None:
    """Do what ``move_kept_paged`` does, in plain torch, request by request and layer by layer."""
    check_move(keys, values, batch, kept_indices)
    heads = torch.arange(keys.num_kv_heads, device=keys.device)[:, None]
    first_page = 0
    for request, (kv_len, prompt_len, budget) in enumerate(
        zip(batch.kv_lens_cpu, batch.prompt_lens_cpu, batch.budgets_cpu, strict=True)
    ):
        tokens = torch.arange(prompt_len, kv_len, device=keys.device)
        pages = batch.kv_indices[first_page + tokens // batch.page_size].long()
        offsets = tokens % batch.page_size
        first_page += pages_needed(kv_len, batch.page_size)
        for layer in range(keys.num_layers):
            kept = kept_indices[layer, request, :, :budget].long()
            for buffers in (keys, values):
                tensor = buffers.tensors[layer]
                # The right-hand side is gathered whole before anything is written, so source and target may overlap.
                tensor[pages[:budget], offsets[:budget], heads] = tensor[pages[kept], offsets[kept], heads]


def check_move(keys: PagedBuffers, values: PagedBuffers, batch: PagedBatch, kept_indices: Tensor) -> None:
    """Raise ``ValueError`` unless the arguments of ``move_kept_paged`` fit each other."""
    for name in ("num_layers", "page_size", "num_kv_heads", "device"):
        if getattr(keys, name) != getattr(values, name):
            raise ValueError(f"values have {name} {getattr(values, name)} and keys {getattr(keys, name)}: make equal")
    if batch.page_size != keys.page_size:
        raise ValueError(f"batch has page_size {batch.page_size} and keys {keys.page_size}: they must be equal")
    wanted = [keys.num_layers, batch.num_requests, keys.num_kv_heads, batch.max_budget]
    if kept_indices.dtype != torch.int32 or list(kept_indices.shape) != wanted or not kept_indices.is_contiguous():
        raise ValueError(
            f"kept_indices must be a contiguous int32 {wanted}, got {kept_indices.dtype} {list(kept_indices.shape)}"
        )
    for name, device in (("batch", batch.device), ("kept_indices", kept_indices.device)):
        if device != keys.device:
            raise ValueError(f"{name} is on {device} and keys on {keys.device}: put all on one device")


_AOT_SIGNATURE = {
    "first_pointers_ptr": "*i64",
    "second_pointers_ptr": "*i64",
    "kv_indptr_ptr": "*i32",
    "kv_indices_ptr": "*i64",
    "prompt_lens_ptr": "*i32",
    "budgets_ptr": "*i32",
    "kept_ptr": "*i32",
    "kept_width": "i32",
}

# (name, kernel, signature, constexprs, num_warps, num_stages) of what is shipped; rows of 64 fp8 to 256 fp32 values.
AOT_CASES = [
    (
        f"move_rows_of_{row_bytes}_bytes_page_{page_size}",
        _move_kept_kernel,
        _AOT_SIGNATURE,
        _constexprs(
            page_size=page_size,
            num_kv_heads=8,
            row_bytes=row_bytes,
            strides_bytes=(page_size * 8 * row_bytes, 8 * row_bytes, row_bytes),
            alignment_bytes=16,
        ),
        NUM_WARPS,
        NUM_STAGES,
    )
    for row_bytes, page_size in [(256, 16), *((row_bytes, 1) for row_bytes in (64, 80, 128, 160, 192, 256, 512, 1024))]
]
