"""Query capture against a plain record, with padded batches, strided queries and every dtype that is served."""

import pytest
import torch

from rkv_sglang.kernels import capture
from rkv_sglang.kernels.capture import capture_queries, capture_queries_torch

CAPTURES = {"triton": capture_queries, "torch": capture_queries_torch}
NUM_LAYERS, NUM_ROWS, MAX_REQUESTS = 3, 3, 8


@pytest.mark.parametrize("capture_step", CAPTURES.values(), ids=CAPTURES)
@pytest.mark.parametrize(
    ("query_dtype", "ring_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_each_row_holds_what_its_request_asked_last(
    seed, rng, monkeypatch, capture_step, query_dtype, ring_dtype, index_dtype
):
    torch.manual_seed(seed)
    # Several programs for a row, the last one not full.
    monkeypatch.setattr(capture, "BLOCK", 16)
    window, num_qo_heads, head_dim = rng.randint(1, 4), rng.randint(1, 5), 8
    row_len = num_qo_heads * head_dim
    rings = torch.full((NUM_LAYERS, NUM_ROWS + 1, window, num_qo_heads, head_dim), torch.nan, dtype=ring_dtype)
    row_of_request = torch.zeros(MAX_REQUESTS, dtype=torch.int64)
    owners = rng.sample(range(1, MAX_REQUESTS), NUM_ROWS)
    row_of_request[owners] = torch.tensor(rng.sample(range(1, NUM_ROWS + 1), NUM_ROWS))
    running = rng.sample(range(1, MAX_REQUESTS), rng.randint(1, MAX_REQUESTS - 1))
    position_of = {request: rng.randint(0, 1000) for request in running}
    record = rings.clone()
    for _ in range(window + 1):
        # Two padded rows, as a CUDA graph has them; queries that are a part of a wider row.
        requests = [*rng.sample(running, len(running)), 0, 0]
        queries = torch.randn(NUM_LAYERS, len(requests), row_len + 16).to(query_dtype)[:, :, :row_len]
        positions = [position_of.get(request, 0) for request in requests]
        capture_step(
            rings,
            row_of_request,
            list(queries),
            torch.tensor(requests, dtype=index_dtype),
            torch.tensor(positions, dtype=index_dtype),
        )
        for i, (request, position) in enumerate(zip(requests, positions, strict=True)):
            row = int(row_of_request[request])
            if row:
                asked = queries[:, i].to(ring_dtype).reshape(NUM_LAYERS, num_qo_heads, head_dim)
                record[:, row, position % window] = asked
                position_of[request] += 1
    # Row 0 belongs to nobody: what is in it does not count.
    torch.testing.assert_close(rings[:, 1:], record[:, 1:], rtol=0, atol=0, equal_nan=True)


def test_the_kernel_writes_nothing_for_requests_without_a_row():
    rings = torch.full((2, 2, 2, 1, 4), torch.nan)
    indices = torch.tensor([0, 1, 2])
    capture_queries(rings, torch.zeros(4, dtype=torch.int64), list(torch.ones(2, 3, 4)), indices, indices)
    assert rings.isnan().all()


def arguments(**changes):
    given = {
        "rings": torch.zeros(2, 3, 2, 2, 4),
        "row_of_request": torch.zeros(5, dtype=torch.int64),
        "layer_queries": list(torch.zeros(2, 2, 8)),
        "req_pool_indices": torch.zeros(2, dtype=torch.int64),
        "positions": torch.zeros(2, dtype=torch.int64),
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rings": torch.zeros(2, 3, 4, 2, 2).transpose(2, 4)}, "rings must be .*contiguous"),
        ({"rings": torch.zeros(2, 3, 2, 8)}, "rings must be"),
        ({"layer_queries": list(torch.zeros(3, 2, 8))}, "rings have 2 layers and layer_queries 3"),
        ({"layer_queries": [torch.zeros(2, 8), torch.zeros(2, 9)]}, r"queries must be floating \[bs, 8\]"),
        ({"layer_queries": list(torch.zeros(2, 2, 8, dtype=torch.int32))}, "queries must be floating"),
        ({"layer_queries": [torch.zeros(8, 2).T] * 2}, "queries must have a last stride of 1"),
        ({"layer_queries": [torch.zeros(2, 8), torch.zeros(2, 9)[:, :8]]}, "queries must be alike in all layers"),
        ({"layer_queries": [torch.zeros(2, 8), torch.zeros(2, 8).half()]}, "queries must be alike in all layers"),
        ({"layer_queries": [torch.zeros(2, 8), torch.zeros(3, 8)]}, "queries must be alike in all layers"),
        ({"row_of_request": torch.zeros(5, dtype=torch.int32)}, "row_of_request must be"),
        ({"req_pool_indices": torch.zeros(3, dtype=torch.int64)}, "req_pool_indices must be"),
        ({"positions": torch.zeros(2)}, "positions must be"),
        ({"positions": torch.zeros(4, dtype=torch.int64)[::2]}, "positions must be .*contiguous"),
        ({"positions": torch.zeros(2, dtype=torch.int64, device="meta")}, "positions is on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        capture_queries(**arguments(**changes))
