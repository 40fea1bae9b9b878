"""Moving kept tokens: against a loop over single rows, on every layout, and nothing else touched."""

import itertools

import pytest
import torch

from rkv_sglang.kernels import move
from rkv_sglang.kernels.move import move_kept_paged, move_kept_torch
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers

MOVES = {"triton": move_kept_paged, "torch": move_kept_torch}
WINDOW = 2


def make_side(layout, num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype):
    """Random bytes in one of the layouts that pools have."""

    def random_bytes(*shape):
        raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
        return raw if dtype.itemsize == 1 else raw.view(dtype)

    if layout == "contiguous":
        return [random_bytes(num_pages, page_size, num_kv_heads, head_dim) for _ in range(num_layers)]
    if layout == "keys and values interleaved":
        return [random_bytes(num_pages, 2, page_size, num_kv_heads, head_dim)[:, 1] for _ in range(num_layers)]
    assert layout == "heads first"
    return [random_bytes(num_kv_heads, num_pages, page_size, head_dim).permute(1, 2, 0, 3) for _ in range(num_layers)]


def make_batch(rng, page_size, num_requests, longest=40):
    """Requests of several lengths and budgets on pages in no order; page 0 belongs to nobody."""
    prompt_lens = [rng.randint(0, 9) for _ in range(num_requests)]
    generated_lens = [rng.randint(WINDOW, longest) for _ in range(num_requests)]
    budgets = [rng.randint(WINDOW, n) for n in generated_lens]
    kv_lens = [p + n for p, n in zip(prompt_lens, generated_lens, strict=True)]
    num_pages = [-(-n // page_size) for n in kv_lens]
    pages = torch.tensor(rng.sample(range(1, sum(num_pages) + 5), sum(num_pages)), dtype=torch.int64)
    lens = {"kv_lens": kv_lens, "prompt_lens": prompt_lens, "budgets": budgets, "window": WINDOW}
    if page_size == 1:
        return PagedBatch.from_slots(pages, **lens)
    return PagedBatch.from_pages(
        torch.tensor([0, *itertools.accumulate(num_pages)], dtype=torch.int32),
        pages.int(),
        torch.tensor([(n - 1) % page_size + 1 for n in kv_lens], dtype=torch.int32),
        page_size=page_size,
        **lens,
    )


def make_kept(rng, batch, num_layers, num_kv_heads):
    """What heads keep: anything, what is in front, or only what is behind."""
    kept = torch.full((num_layers, batch.num_requests, num_kv_heads, batch.max_budget), -1, dtype=torch.int32)
    for layer, request, head in itertools.product(range(num_layers), range(batch.num_requests), range(num_kv_heads)):
        num_generated = batch.kv_lens_cpu[request] - batch.prompt_lens_cpu[request]
        budget = batch.budgets_cpu[request]
        chosen = rng.choice(
            [sorted(rng.sample(range(num_generated), budget)), range(budget), range(num_generated)[-budget:]]
        )
        kept[layer, request, head, :budget] = torch.tensor(list(chosen))
    return kept


def moved_row_by_row(tensors, batch, kept):
    """The pool afterwards, by definition: reads come from a copy."""
    after = [tensor.clone() for tensor in tensors]
    first_pages = [0, *itertools.accumulate(-(-n // batch.page_size) for n in batch.kv_lens_cpu)]
    for layer, request, head in itertools.product(*(range(n) for n in kept.shape[:3])):

        def place(index, request=request):
            token = batch.prompt_lens_cpu[request] + index
            page = int(batch.kv_indices[first_pages[request] + token // batch.page_size])
            return page, token % batch.page_size

        for target, source in enumerate(kept[layer, request, head, : batch.budgets_cpu[request]].tolist()):
            after[layer][*place(target), head] = tensors[layer][*place(source), head]
    return after


@pytest.mark.parametrize("move_kept", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [
        (torch.bfloat16, 64, 64),
        (torch.float16, 80, 80),
        (torch.float32, 96, 64),
        (torch.uint8, 128, 128),
        # Rows of 10, 3 and 12 bytes: no 16-byte access fits.
        (torch.bfloat16, 5, 5),
        (torch.uint8, 3, 3),
        (torch.uint8, 12, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("layout", ["contiguous", "keys and values interleaved", "heads first"])
def test_rows_go_where_they_belong_and_nothing_else_changes(
    seed, rng, monkeypatch, move_kept, dtype, head_dim, value_dim, page_size, layout
):
    torch.manual_seed(seed)
    # Chunks of a few rows, so that many follow each other.
    monkeypatch.setattr(move, "CHUNK_BYTES", 4 * 128 * dtype.itemsize)
    num_layers, num_kv_heads = rng.randint(1, 2), rng.randint(1, 3)
    batch = make_batch(rng, page_size, num_requests=rng.randint(1, 3), longest=24)
    num_pages = int(batch.kv_indices.max()) + 2
    logical_dtype = torch.float8_e4m3fn if dtype == torch.uint8 else dtype
    sides = [
        make_side(layout, num_layers, num_pages, page_size, num_kv_heads, dim, dtype) for dim in (head_dim, value_dim)
    ]
    kept = make_kept(rng, batch, num_layers, num_kv_heads)
    expected = [moved_row_by_row(side, batch, kept) for side in sides]

    move_kept(*(PagedBuffers.from_tensors(side, dtype=logical_dtype) for side in sides), batch, kept)

    for side, expected_side in zip(sides, expected, strict=True):
        for tensor, expected_tensor in zip(side, expected_side, strict=True):
            # As bytes: NaN is equal to itself.
            assert torch.equal(tensor.contiguous().view(torch.uint8), expected_tensor.contiguous().view(torch.uint8))


@pytest.mark.parametrize("move_kept", MOVES.values(), ids=MOVES)
def test_sources_and_targets_may_overlap_as_much_as_they_can(move_kept, monkeypatch):
    # Each head shifts everything by a different distance, below, at and above the length of a chunk.
    monkeypatch.setattr(move, "CHUNK_BYTES", 4 * 16 * 4)
    shifts = (0, 1, 3, 4, 5, 11)
    pool = torch.arange(32.0)[:, None, None].repeat(1, len(shifts), 16)
    kept = torch.stack([torch.arange(shift, shift + 20) for shift in shifts])[None, None].int()
    batch = PagedBatch.from_slots(torch.arange(32), kv_lens=[32], prompt_lens=[0], budgets=[20], window=WINDOW)
    move_kept(PagedBuffers.from_tensors([pool]), PagedBuffers.from_tensors([pool.clone()]), batch, kept)
    for head, shift in enumerate(shifts):
        assert pool[:20, head, 0].tolist() == list(range(shift, shift + 20))
        assert pool[20:, head, 0].tolist() == list(range(20, 32))


def arguments(**changes):
    pool = torch.zeros(16, 2, 8)
    given = {
        "keys": PagedBuffers.from_tensors([pool]),
        "values": PagedBuffers.from_tensors([pool.clone()]),
        "batch": PagedBatch.from_slots(torch.arange(9), kv_lens=[9], prompt_lens=[1], budgets=[4], window=WINDOW),
        "kept_indices": torch.zeros(1, 1, 2, 4, dtype=torch.int32),
    }
    return given | changes


PAGES_OF_TWO = PagedBuffers.from_tensors([torch.zeros(8, 2, 2, 8)])


@pytest.mark.parametrize("move_kept", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": PagedBuffers.from_tensors([torch.zeros(16, 3, 8)])}, "values have num_kv_heads 3 and keys 2"),
        ({"values": PagedBuffers.from_tensors([torch.zeros(16, 2, 8)] * 2)}, "values have num_layers 2"),
        ({"keys": PAGES_OF_TWO, "values": PAGES_OF_TWO}, "batch has page_size 1 and keys 2"),
        ({"kept_indices": torch.zeros(1, 1, 2, 4)}, "kept_indices must be a contiguous int32"),
        ({"kept_indices": torch.zeros(1, 1, 2, 3, dtype=torch.int32)}, r"kept_indices .* \[1, 1, 2, 4\]"),
        ({"kept_indices": torch.zeros(1, 1, 4, 2, dtype=torch.int32).transpose(2, 3)}, "kept_indices .*contiguous"),
        ({"kept_indices": torch.zeros(1, 1, 2, 4, dtype=torch.int32, device="meta")}, "kept_indices is on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(move_kept, changes, message):
    with pytest.raises(ValueError, match=message):
        move_kept(**arguments(**changes))
