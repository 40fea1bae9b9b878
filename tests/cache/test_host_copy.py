"""A copy on the host holds exactly the bytes of its slots, and writes exactly those slots back."""

import pytest
import torch

from rkv_sglang.cache import host_copy
from rkv_sglang.cache.host_copy import load_slots, save_slots

LAYERS, SLOTS, HEADS, HEAD_DIM, V_HEAD_DIM = 3, 40, 2, 8, 6
DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


def pools(dtype: torch.dtype, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return keys and values of all layers; they lie beside each other in one allocation, as SGLang may have them."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randint(0, 256, (LAYERS, SLOTS, HEADS, HEAD_DIM + V_HEAD_DIM), generator=generator).to(dtype)
    return [layer[..., :HEAD_DIM] for layer in both], [layer[..., HEAD_DIM:] for layer in both]


@pytest.mark.parametrize("first", [0, 5, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots_come_back_elsewhere_and_nothing_else_changes(dtype, first):
    keys, values = pools(dtype, 1)
    before = [tensor.clone() for tensor in (*keys, *values)]
    slots = torch.randperm(SLOTS - 1)[:12] + 1
    copy = save_slots(keys, values, slots)
    assert copy is not None and copy.num_tokens == 12
    assert all(torch.equal(now, old) for now, old in zip((*keys, *values), before, strict=True))

    others = pools(dtype, 2)
    expected = [[tensor.clone() for tensor in layers] for layers in others]
    targets = torch.randperm(SLOTS - 1)[: 12 - first] + 1
    for layer in range(LAYERS):
        expected[0][layer][targets] = keys[layer][slots[first:]]
        expected[1][layer][targets] = values[layer][slots[first:]]
    load_slots(copy, *others, targets, first=first)
    for found, right in zip(others, expected, strict=True):
        assert all(torch.equal(now, then) for now, then in zip(found, right, strict=True))


def test_a_cache_of_one_entry_a_token_comes_back_too():
    latents, _ = pools(torch.float32, 1)
    others, _ = pools(torch.float32, 2)
    copy = save_slots(latents, (), torch.tensor([3, 9, 4]))
    assert copy is not None and copy.num_tokens == 3
    load_slots(copy, others, (), torch.tensor([7, 8]), first=1)
    for latent, other in zip(latents, others, strict=True):
        assert torch.equal(other[[7, 8]], latent[[9, 4]])


def test_another_number_of_slots_is_refused():
    keys, values = pools(torch.float32, 1)
    copy = save_slots(keys, values, torch.arange(1, 6))
    assert copy is not None
    with pytest.raises(ValueError, match="5 tokens from 2 on do not go into 4 slots"):
        load_slots(copy, keys, values, torch.arange(1, 5), first=2)


def test_without_memory_there_is_no_copy(monkeypatch):
    def fail(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    keys, values = pools(torch.float32, 1)
    monkeypatch.setattr(host_copy.torch, "empty", fail)
    assert save_slots(keys, values, torch.arange(1, 6)) is None
