"""The query window against a plain record of every query, under random arrivals, ends and reuse of rows."""

import random

import pytest
import torch

from rkv_sglang.cache.query_window import QueryWindow
from rkv_sglang.kernels.capture import LAYERS_PER_LAUNCH

# Several launches a step, the last one of fewer layers.
NUM_LAYERS, NUM_QO_HEADS, HEAD_DIM = 2 * LAYERS_PER_LAUNCH + 3, 3, 4
ALL_LAYERS = slice(NUM_LAYERS)


def make_window(num_rows: int, window: int, max_requests: int = 9) -> QueryWindow:
    return QueryWindow(
        num_layers=NUM_LAYERS,
        num_rows=num_rows,
        window=window,
        num_qo_heads=NUM_QO_HEADS,
        head_dim=HEAD_DIM,
        max_requests=max_requests,
        dtype=torch.float32,
        device="cpu",
    )


class FakeRequest:
    """Stands for the engine's request: all that the window sees of one is whether it still runs."""

    def __init__(self, req_pool_idx: int, position: int) -> None:
        self.req_pool_idx: int | None = req_pool_idx
        self.position = position
        self.queries: list[torch.Tensor] = []


def is_alive(req_pool_idx: int, owner: object) -> bool:
    return isinstance(owner, FakeRequest) and owner.req_pool_idx == req_pool_idx


@pytest.mark.parametrize("seed", range(20))
def test_read_returns_the_last_queries_whatever_happened_to_other_rows(seed):
    rng = random.Random(seed)
    window_len = rng.randint(1, 6)
    window = make_window(num_rows=3, window=window_len)
    running: list[FakeRequest] = []
    reads = 0
    for _ in range(200):
        if len(running) < 5 and rng.random() < 0.3:
            idx = rng.choice([i for i in range(1, 9) if i not in [r.req_pool_idx for r in running]])
            running.append(FakeRequest(idx, rng.randint(0, 50)))
        for request in list(running):
            if rng.random() < 0.08:
                # It ends without telling anybody.
                request.req_pool_idx = None
                running.remove(request)
        owners = [r for r in running if window.has_row(r.req_pool_idx, r)]
        for request in running:
            if request not in owners and len(owners) < 3 and rng.random() < 0.3:
                window.acquire(request.req_pool_idx, request, is_alive)
                request.queries = []
                owners.append(request)
        window.flush()
        if running:
            # Two padded rows, as a CUDA graph has them.
            indices = torch.tensor([r.req_pool_idx for r in running] + [0, 0])
            positions = torch.tensor([r.position for r in running] + [0, 0])
            queries = torch.randn(NUM_LAYERS, len(running) + 2, NUM_QO_HEADS, HEAD_DIM)
            for layer in range(NUM_LAYERS):
                window.capture(layer, queries[layer].flatten(1), indices, positions)
            for i, request in enumerate(running):
                request.queries.append(queries[:, i])
                request.position += 1
        ready = [r for r in owners if len(r.queries) >= window_len]
        together = window.read([(r.req_pool_idx, r.position) for r in ready], ALL_LAYERS)
        assert together.nbytes == len(ready) * window.row_bytes
        some = slice(1, 4)
        assert torch.equal(window.read([(r.req_pool_idx, r.position) for r in ready], some), together[some])
        assert together.shape == (NUM_LAYERS, len(ready), window_len, NUM_QO_HEADS, HEAD_DIM)
        for i, request in enumerate(ready):
            assert torch.equal(together[:, i], torch.stack(request.queries[-window_len:], dim=1))
        for request in owners:
            if len(request.queries) >= window_len:
                expected = torch.stack(request.queries[-window_len:], dim=1)
                assert torch.equal(window.read([(request.req_pool_idx, request.position)], ALL_LAYERS)[:, 0], expected)
                reads += 1
                if rng.random() < 0.2:
                    window.release(request.req_pool_idx)
    assert reads > 20


def test_a_step_that_fails_half_way_leaves_nothing_and_a_layer_left_out_is_an_error():
    window = make_window(num_rows=1, window=1)
    owner = FakeRequest(1, 0)
    window.acquire(1, owner, is_alive)
    window.flush()
    index, position = torch.tensor([1]), torch.tensor([0])
    failed, whole = torch.randn(2, NUM_LAYERS, 1, NUM_QO_HEADS * HEAD_DIM)
    for layer in range(LAYERS_PER_LAUNCH - 1):
        window.capture(layer, failed[layer], index, position)
    for layer in range(NUM_LAYERS):
        window.capture(layer, whole[layer], index, position)
    assert torch.equal(window.read([(1, 1)], ALL_LAYERS).flatten(), whole.flatten())
    with pytest.raises(ValueError, match=f"queries of {LAYERS_PER_LAUNCH - 1} came"):
        for layer in (layer for layer in range(NUM_LAYERS) if layer != 3):
            window.capture(layer, whole[layer], index, position)


def test_rows_of_requests_that_ended_are_taken_back_and_living_ones_never():
    window = make_window(num_rows=2, window=2)
    first, second, third = (FakeRequest(i, 0) for i in (1, 2, 3))
    window.acquire(1, first, is_alive)
    window.acquire(2, second, is_alive)
    with pytest.raises(RuntimeError, match="all 2 query rows"):
        window.acquire(3, third, is_alive)
    first.req_pool_idx = None
    window.acquire(3, third, is_alive)
    assert window.has_row(2, second) and window.has_row(3, third) and not window.has_row(1, first)


def test_a_new_request_under_an_old_index_does_not_inherit_its_row():
    window = make_window(num_rows=2, window=2)
    old, new, other = FakeRequest(1, 0), FakeRequest(1, 0), FakeRequest(2, 0)
    window.acquire(1, old, is_alive)
    old.req_pool_idx = None
    assert not window.has_row(1, new)
    window.acquire(1, new, is_alive)
    window.acquire(2, other, is_alive)
    window.flush()
    assert len(set(window.row_of_request[1:3].tolist())) == 2
