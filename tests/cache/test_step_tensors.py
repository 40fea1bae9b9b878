"""Slots and lengths of the due requests of a batch: the same as one by one, by as many operations for any number."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rkv_sglang.cache.query_window import QueryWindow
from rkv_sglang.cache.step_tensors import read_slots, subtract_evicted, warm_up_step

ROUNDS = range(6)


class Operations(TorchDispatchMode):
    """Names of the operations of torch, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("_round", ROUNDS)
def test_slots_are_those_of_each_row_in_order(_round, rng):
    width = rng.randint(1, 30)
    req_to_token = torch.randint(0, 10**6, (12, width), dtype=torch.int32)
    rows = rng.sample(range(12), rng.randint(1, 12))
    lengths = [rng.randint(1, width) for _ in rows]
    slots = read_slots(req_to_token, rows, lengths)
    for row, length, own in zip(rows, lengths, slots, strict=True):
        assert own.dtype == torch.int64
        assert own.tolist() == req_to_token[row, :length].tolist()
    # A snapshot.
    req_to_token.zero_()
    assert any(own.any() for own in slots)
    assert len({own.untyped_storage().data_ptr() for own in slots}) == 1


def test_as_many_operations_for_two_requests_as_for_many():
    req_to_token = torch.randint(0, 10**6, (256, 40), dtype=torch.int32)
    counts = []
    for num_requests in (2, 256):
        with Operations() as operations:
            read_slots(req_to_token, list(range(num_requests)), [30] * num_requests)
        counts.append(len(operations.names))
        assert operations.names.count("index.Tensor") == 1
        # Nothing that a GPU would have to be waited for.
        assert not {"_local_scalar_dense.default", "nonzero.default"} & set(operations.names)
    assert counts[0] == counts[1]


def test_lengths_shrink_in_new_tensors():
    seq_lens, seq_lens_cpu = torch.tensor([9, 8, 7]), torch.tensor([9, 8, 7])
    found, found_cpu = subtract_evicted(seq_lens, seq_lens_cpu, [0, 3, 0])
    assert found.tolist() == found_cpu.tolist() == [9, 5, 7]
    assert seq_lens.tolist() == seq_lens_cpu.tolist() == [9, 8, 7]


def test_the_warm_up_runs_what_a_compaction_will_and_leaves_all_as_it_was():
    window = QueryWindow(
        num_layers=2,
        num_rows=3,
        window=4,
        num_qo_heads=2,
        head_dim=8,
        max_requests=5,
        dtype=torch.float32,
        device="cpu",
    )
    window.rings.uniform_()
    before = {name: value.clone() for name, value in vars(window).items() if isinstance(value, torch.Tensor)}
    req_to_token = torch.arange(50, dtype=torch.int32).view(5, 10)
    with Operations() as operations:
        warm_up_step(window, req_to_token)
    assert {"index_put_.default", "index_select.default", "index.Tensor", "sub.Tensor"} <= set(operations.names)
    assert all(torch.equal(vars(window)[name], value) for name, value in before.items())
    assert not window.active and req_to_token.flatten().tolist() == list(range(50))
    owners = [object() for _ in range(3)]
    for req_pool_idx, owner in enumerate(owners, start=1):
        window.acquire(req_pool_idx, owner, lambda *_: True)
