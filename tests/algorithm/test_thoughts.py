"""Kinds of thoughts and what stays of them, against the definition in plain numbers, over many compactions."""

import random

import pytest
import torch

from rkv_sglang.algorithm.centroids import nearest_to_centroids
from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION
from rkv_sglang.algorithm.thoughts import AIM, HELD, KEPT, kind_of, next_table, sizes_of_levels, sparsities
from tests.algorithm.cases import fresh_seed
from tests.support.oracle import thoughts as oracle

KINDS = (oracle.EXECUTION, oracle.REASONING, oracle.TRANSITION)


@pytest.mark.parametrize("attempt", range(12))
def test_tables_over_many_compactions_are_those_of_the_definition(attempt: int) -> None:
    rng = random.Random(fresh_seed() + attempt)
    segment, room = rng.randint(1, 40), rng.randint(1, 90)
    request, table = oracle.Request(), None
    num_candidates = room + rng.randint(1, 3 * segment)
    for _ in range(40):
        kind = rng.choices(range(3), (1, rng.random() * 4, rng.random() * 3))[0]
        table = next_table(table, torch.tensor(kind), num_candidates, room, segment)
        expected = request.compact(KINDS[kind], num_candidates, room, segment)
        found = [(held, aim) for held, aim in table[[HELD, AIM]].T.tolist() if held > 0]
        assert found == expected
        assert [kept for kept in table[KEPT].tolist() if kept > 0] == [s.held for s in request.segments if s.held > 0]
        assert int(table[KEPT].sum()) == room and table.shape[1] <= room + -(-num_candidates // segment)
        # Most compactions come after as many tokens; a request may have a buffer of its own.
        num_candidates = room + (segment if rng.random() < 0.8 else rng.randint(1, 2 * segment))


def test_the_levels_of_published_segments_are_the_published_ones() -> None:
    assert sizes_of_levels(128) == [128, 64, 32, 16, 8, 4]
    assert sizes_of_levels(9) == [9, 4] and sizes_of_levels(3) == [3]


def test_one_after_another_shrinks_by_kind_and_age() -> None:
    """Segments of 16, room for 40: what came first shrinks, and before it what is a transition."""
    kind = [torch.tensor(number) for number in range(3)]
    table = next_table(None, kind[1], 56, 40, 16)
    # 8 + 16 + 16 + 16 candidates of one kind: the oldest two go down, and 40 are left of 4 + 4 + 16 + 16.
    assert table[[HELD, AIM, KEPT]].tolist() == [[8, 16, 16, 16], [4, 4, 16, 16], [4, 4, 16, 16]]
    table = next_table(table, kind[2], 56, 40, 16)
    # The new one is a transition: all others shrink once, there are 4 + 4 + 8 + 8 + 16, and the newest fill up.
    assert table[[HELD, AIM, KEPT]].tolist() == [[4, 4, 16, 16, 16], [4, 4, 8, 8, 16], [4, 4, 8, 8, 16]]
    table = next_table(table, kind[0], 56, 40, 16)
    # The transition shrinks to 4 before anything else does, then execution, new as it is, once; 4 tokens fill up.
    assert table[[HELD, AIM, KEPT]].tolist() == [[4, 4, 8, 8, 16, 16], [4, 4, 8, 8, 4, 8], [4, 4, 8, 8, 4, 12]]


@pytest.mark.parametrize("attempt", range(4))
def test_sparsity_is_its_definition(attempt: int) -> None:
    torch.manual_seed(fresh_seed())
    num_kv_heads, group_size, window, num_tokens, head_dim = 2, 1 + attempt, 1 + 2 * attempt, 30, 8
    queries = 3 * torch.randn(window, num_kv_heads * group_size, head_dim)
    keys = torch.randn(num_tokens, num_kv_heads, head_dim)
    for negligible in (0.0, 0.01, 0.3, 1.0):
        found = float(sparsities(queries, keys, negligible, PLAIN_ATTENTION).mean())
        by_head = queries.double().unflatten(1, (num_kv_heads, group_size)).permute(1, 2, 0, 3).numpy()
        expected = oracle.sparsity_of_layer(
            by_head, keys.double().transpose(0, 1).numpy(), negligible, lambda product: product / head_dim**0.5
        )
        # One entry more or less, where one is as good as at the border.
        assert abs(found - expected) < 1e-6 + (1 / num_tokens / window if 0 < negligible < 1 else 0)


def test_kinds_by_their_bounds() -> None:
    bounds = (0.25, 0.75)
    for number in (0.0, 0.25, 0.5, 0.75, 0.8):
        assert KINDS[int(kind_of(torch.tensor(number), *bounds))] == oracle.kind_of(number, *bounds)


def test_keys_that_stand_for_others_lie_in_as_many_heaps() -> None:
    torch.manual_seed(fresh_seed())
    heaps = 10 * torch.eye(5, 8)
    members = torch.randint(5, (2, 40))
    members[:, :5] = torch.arange(5)
    keys = heaps[members] + 0.1 * torch.randn(2, 40, 8)
    one_segment = {"segment": 40, "most": 20, "rounds": 4}
    chosen = nearest_to_centroids(keys, torch.tensor([40]), torch.tensor([5]), **one_segment)
    for head in range(2):
        assert sorted(members[head][chosen[head]].tolist()) == [0, 1, 2, 3, 4]


def test_what_a_segment_keeps_does_not_depend_on_the_others() -> None:
    torch.manual_seed(fresh_seed())
    keys = torch.randn(2, 60, 8)
    sizes = {"segment": 20, "most": 10, "rounds": 4}
    held, aims = torch.tensor([20, 0, 17, 20, 3]), torch.tensor([6, 0, 17, 9, 0])
    chosen = nearest_to_centroids(keys, held, aims, **sizes)
    assert chosen.sum(dim=1).tolist() == [32, 32]
    assert torch.equal(chosen[:, 20:37], torch.ones(2, 17, dtype=torch.bool))
    for first, count, aim in ((0, 20, 6), (37, 20, 9), (57, 3, 0)):
        own = keys[:, first : first + count]
        alone = nearest_to_centroids(own, torch.tensor([count]), torch.tensor([aim]), **sizes)
        assert torch.equal(chosen[:, first : first + count], alone)
