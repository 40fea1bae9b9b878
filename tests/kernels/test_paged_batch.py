"""What kernels are given: page tables from slots and from pages, and pools of every layout."""

import pytest
import torch

from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers

LENS = {"kv_lens": [5, 9], "prompt_lens": [2, 0], "budgets": [3, 4], "window": 2}


def page_table() -> list[torch.Tensor]:
    """Two requests of 5 and 9 tokens on pages of 4."""
    return [
        torch.tensor([0, 2, 5], dtype=torch.int32),
        torch.tensor([7, 3, 1, 4, 6], dtype=torch.int32),
        torch.tensor([1, 1], dtype=torch.int32),
    ]


def test_slots_become_pages_of_one_token():
    batch = PagedBatch.from_slots(torch.arange(14), **LENS)
    assert batch.page_size == 1
    for tensor, dtype, values in (
        (batch.kv_indptr, torch.int32, [0, 5, 14]),
        (batch.kv_last_page_len, torch.int32, [1, 1]),
        (batch.token_indptr, torch.int64, [0, 5, 14]),
        (batch.prompt_lens, torch.int32, [2, 0]),
        (batch.budgets, torch.int32, [3, 4]),
    ):
        assert tensor.dtype == dtype
        assert tensor.tolist() == values
    assert (batch.num_requests, batch.num_tokens, batch.max_kv_len, batch.max_budget) == (2, 14, 9, 4)


def test_a_page_table_is_taken_as_it_is():
    kv_indptr, kv_indices, kv_last_page_len = page_table()
    batch = PagedBatch.from_pages(kv_indptr, kv_indices, kv_last_page_len, page_size=4, **LENS)
    assert torch.equal(batch.kv_indptr, kv_indptr)
    assert torch.equal(batch.kv_last_page_len, kv_last_page_len)
    assert batch.kv_indices.data_ptr() == kv_indices.data_ptr()
    assert batch.token_indptr.tolist() == [0, 5, 14]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lens": []}, r"one entry per request, at least one, got \[0, 2, 2\]"),
        ({"budgets": [3]}, r"one entry per request, at least one, got \[2, 2, 1\]"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 4}, "request 0 needs .* window 4, budget 3, kv_len 5"),
        ({"budgets": [3, 10]}, "request 1 needs .* prompt_len 0, window 2, budget 10, kv_len 9"),
        ({"prompt_lens": [-1, 0]}, "request 0 needs prompt_len >= 0 .* got prompt_len -1"),
    ],
)
def test_lengths_that_cannot_be_are_refused(change, message):
    lens = LENS | change
    with pytest.raises(ValueError, match=message):
        PagedBatch.from_slots(torch.arange(sum(lens["kv_lens"])), **lens)


def test_tables_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"slots must be \[14\], the sum of kv_lens, got \[13\]"):
        PagedBatch.from_slots(torch.arange(13), **LENS)
    with pytest.raises(ValueError, match=r"kv_indices must be contiguous int32 or int64, got torch.float32"):
        PagedBatch.from_slots(torch.zeros(14), **LENS)
    kv_indptr, kv_indices, kv_last_page_len = page_table()
    for table, message in (
        ((kv_indptr.long(), kv_indices, kv_last_page_len), r"kv_indptr must be int32 \[3\] on cpu.*got torch.int64"),
        ((kv_indptr, kv_indices, kv_last_page_len[:1]), r"kv_last_page_len must be int32 \[2\].*got torch.int32 \[1\]"),
        ((kv_indptr.to("meta"), kv_indices, kv_last_page_len), "kv_indptr must be int32 .* on meta"),
        ((kv_indptr, kv_indices[:4], kv_last_page_len), r"kv_indices must hold the 5 pages of kv_lens, got \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedBatch.from_pages(*table, page_size=4, **LENS)
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        PagedBatch.from_pages(kv_indptr, kv_indices, kv_last_page_len, page_size=0, **LENS)


def test_buffers_name_every_row_by_pointer_and_strides():
    layers = [torch.arange(7 * 2 * 3 * 4 * 8).view(7, 2, 3, 4, 8).half()[:, 1] for _ in range(2)]
    buffers = PagedBuffers.from_tensors(layers, scales=[0.5, 2])
    assert (buffers.num_layers, buffers.page_size, buffers.num_kv_heads, buffers.head_dim) == (2, 3, 4, 8)
    assert buffers.scales.tolist() == [0.5, 2.0]
    for layer, tensor in enumerate(layers):
        for page, offset, head in ((0, 0, 0), (6, 2, 3), (4, 1, 2)):
            steps = page * buffers.stride_page + offset * buffers.stride_slot + head * buffers.stride_head
            address = int(buffers.pointers[layer]) + 2 * steps
            assert address == tensor[page, offset, head].data_ptr()
            assert address % buffers.alignment_bytes == 0
    assert buffers.alignment_bytes == 16


def test_slots_are_pages_of_one_token_and_fp8_is_bytes():
    layers = [torch.zeros(5, 2, 80, dtype=torch.float8_e5m2)]
    buffers = PagedBuffers.from_tensors(layers)
    assert (buffers.page_size, buffers.stride_page, buffers.stride_head) == (1, 160, 80)
    assert (buffers.dtype, buffers.storage_dtype) == (torch.float8_e5m2, torch.uint8)
    assert buffers.tensors[0].data_ptr() == layers[0].data_ptr()
    as_bytes = PagedBuffers.from_tensors([layers[0].view(torch.uint8)], dtype=torch.float8_e4m3fn)
    assert (as_bytes.dtype, as_bytes.storage_dtype) == (torch.float8_e4m3fn, torch.uint8)


@pytest.mark.parametrize(("offset", "head_dim", "alignment_bytes"), [(0, 8, 16), (4, 8, 8), (1, 8, 2), (0, 6, 4)])
def test_alignment_is_that_of_the_worst_row(offset, head_dim, alignment_bytes):
    flat = torch.zeros(5 * 2 * head_dim + 8, dtype=torch.float16)
    assert flat.data_ptr() % 16 == 0
    layer = flat[offset : offset + 5 * 2 * head_dim].view(5, 2, head_dim)
    assert PagedBuffers.from_tensors([layer]).alignment_bytes == alignment_bytes


def test_buffers_that_do_not_fit_are_refused_by_name():
    layer = torch.zeros(5, 2, 64)
    for layers, message in (
        ([], "tensors must hold at least one layer"),
        ([layer[0]], r"tensors must be \[pages, page_size, heads, head_dim\] or"),
        ([layer.transpose(1, 2)], "with stride 1, got"),
        ([torch.zeros(5, 2, 257)], "at most 256"),
        ([layer, torch.zeros(5, 2, 32)], r"tensors\[1\] is \(\[5, 2, 32\]"),
        ([layer, layer.half()], r"tensors\[1\] is .*torch.float16"),
        ([layer.long()], "tensors of torch.int64 cannot be read as torch.int64"),
        ([layer.to(torch.uint8)], "tensors of torch.uint8 cannot be read as torch.uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedBuffers.from_tensors(layers)
    with pytest.raises(ValueError, match=r"tensors of torch.float32 cannot be read as torch.bfloat16"):
        PagedBuffers.from_tensors([layer], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="scales must have one entry per layer, 1, got 2"):
        PagedBuffers.from_tensors([layer], scales=[1.0, 1.0])
