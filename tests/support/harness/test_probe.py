"""The parts of the probe that need no scheduler: what counts as a change, and who owns a page."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.harness.environment import PROBE_DIR


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PROBE_DIR / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shadow_module = load("rkv_shadow")
census = load("rkv_census").census
TREE, PoolShadow, private_holder = shadow_module.TREE, shadow_module.PoolShadow, shadow_module.private_holder


def pool(num_slots: int = 16) -> list[torch.Tensor]:
    return [torch.randn(num_slots, 2, 4) for _ in range(4)]


def holders(num_slots: int = 16, **slots_of: list[int]) -> np.ndarray:
    """``tree=[..]`` and ``r1=[..]``: the slots of the tree, and of request 1 at positions 0, 1, .."""
    holder = np.zeros(num_slots, dtype=np.int64)
    for name, slots in slots_of.items():
        holder[slots] = TREE if name == "tree" else private_holder(int(name[1:]), 0, len(slots))
    return holder


def test_only_slots_whose_holder_stayed_are_compared() -> None:
    buffers = pool()
    shadow = PoolShadow(buffers)
    shadow.record(holders(tree=[1, 2], r1=[3, 4, 5]))
    buffers[0][1, 0, 0] += 1
    buffers[3][4, 1, 3] += 1
    buffers[2][5, 0, 0] += 1
    # Slot 5 went to another request, so writing it was right.
    found = shadow.compare(holders(tree=[1, 2], r1=[3, 4], r2=[5]))
    assert found == [
        {"slot": 1, "buffers": [0], "holder": "tree"},
        {"slot": 4, "buffers": [3], "holder": "request #1 position 1"},
    ]
    assert shadow.compare(holders(tree=[1, 2], r1=[3, 4], r2=[5])) == [], "a change is reported once"


def test_a_slot_given_to_the_tree_keeps_its_contents() -> None:
    buffers = pool()
    shadow = PoolShadow(buffers)
    shadow.record(holders(r1=[3, 4]))
    buffers[1][4] += 1
    assert [entry["slot"] for entry in shadow.compare(holders(tree=[3, 4]))] == [4]


def test_a_slot_that_was_let_go_in_between_starts_afresh() -> None:
    buffers = pool()
    shadow = PoolShadow(buffers)
    shadow.record(holders(tree=[3]))
    shadow.compare(holders())
    buffers[1][3] += 1
    shadow.record(holders(tree=[3]))
    assert shadow.compare(holders(tree=[3])) == []


def test_a_compaction_may_rewrite_what_was_generated_and_nothing_else() -> None:
    buffers = pool()
    shadow = PoolShadow(buffers)
    shadow.record(holders(r1=[1, 2, 3, 4], r2=[5, 6, 7]))
    shadow.forget_positions(1, 2)
    for slot in (2, 3, 4, 7):
        buffers[0][slot] += 1
    found = shadow.compare(holders(r1=[1, 2, 3, 4], r2=[5, 6, 7]))
    assert [(entry["slot"], entry["holder"]) for entry in found] == [
        (2, "request #1 position 1"),
        (7, "request #2 position 2"),
    ]


def test_bytes_are_compared_not_values() -> None:
    buffers = pool()
    buffers[0][1] = float("nan")
    buffers[0][2] = 0.0
    shadow = PoolShadow(buffers)
    shadow.record(holders(tree=[1, 2]))
    assert shadow.compare(holders(tree=[1, 2])) == []
    buffers[0][2] = -0.0
    assert [entry["slot"] for entry in shadow.compare(holders(tree=[1, 2]))] == [2]


@pytest.mark.parametrize(
    ("free", "tree", "private", "lost", "shared"),
    [
        ([4, 5, 6, 7, 8], [1, 2], [3], 0, 0),
        ([4, 5, 6, 7], [1, 2], [3], 1, 0),
        ([4, 5, 6, 7, 8, 8], [1, 2], [3], 0, 1),
        ([3, 4, 5, 6, 7, 8], [1, 2], [3], 0, 1),
        ([4, 5, 6, 7, 8], [1, 2, 3], [3], 0, 1),
        ([0, 4, 5, 6, 7, 8], [1, 2], [3], 0, 0),
    ],
    ids=["whole", "lost", "freed twice", "free but held", "tree and request", "dummy page free"],
)
@pytest.mark.parametrize("page_size", [1, 4])
def test_census(page_size: int, free: list[int], tree: list[int], private: list[int], lost: int, shared: int) -> None:
    allocator = SimpleNamespace(
        page_size=page_size, size=8 * page_size, get_all_free_pages=lambda: torch.tensor(free, dtype=torch.int64)
    )
    pages = torch.tensor(tree)
    tree_slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
    wrong = census(allocator, tree_slots, {"r": torch.tensor(private)})
    if (free, tree, private) == ([4, 5, 6, 7, 8], [1, 2], [3]):
        assert wrong == []
        return
    ((kind, detail),) = wrong
    assert (kind, detail["num_lost"], detail["num_shared"]) == ("ownership", lost, shared)
