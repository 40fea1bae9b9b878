"""A recorded compaction comes back bit for bit, and compactions compose into the tokens that are still held."""

import base64
import random
import zlib

import numpy as np
import pytest

from rkv_sglang.cache.trace import kept_positions, pack_compaction, unpack_kept
from tests.cache.trace_cases import History, random_history


def some_history(rng: random.Random, computed_again: tuple[int, ...] = ()) -> History:
    return random_history(
        rng,
        num_layers=rng.randint(1, 4),
        num_kv_heads=rng.randint(1, 3),
        budget=rng.randint(2, 19),
        buffer=rng.randint(1, 11),
        num_tokens=rng.randint(60, 120),
        computed_again=computed_again,
    )


def composed(history: History) -> list:
    return kept_positions(history.compactions, history.num_layers, history.num_kv_heads, history.num_tokens)


def test_packing_and_unpacking_gives_the_same_tokens(rng):
    for _ in range(100):
        num_layers, num_kv_heads, resident_len = rng.randint(1, 5), rng.randint(1, 5), rng.randint(1, 70)
        budget = rng.randint(1, resident_len)
        kept = [
            [sorted(rng.sample(range(resident_len), budget)) for _ in range(num_kv_heads)] for _ in range(num_layers)
        ]
        packed = pack_compaction(np.array(kept), resident_len=resident_len, evicted_before=rng.randint(0, 9))
        mask = unpack_kept(packed, num_layers, num_kv_heads)
        assert mask.shape == (num_layers, num_kv_heads, resident_len)
        found = [[[token for token in range(resident_len) if row[token]] for row in rows] for rows in mask]
        assert found == kept


def test_what_is_sent_is_small_and_plain():
    kept = np.tile(np.arange(1024), (32, 8, 1))
    packed = pack_compaction(kept, resident_len=1152, evicted_before=5)
    assert (packed["resident_len"], packed["evicted_before"]) == (1152, 5)
    assert {type(value) for value in packed.values()} == {int, str}
    assert len(packed["kept"]) <= 4 * (32 * 8 * 1152 / 8) / 3 + 100


@pytest.mark.parametrize("preemptions", [0, 1, 3])
def test_composing_equals_moving_lists_of_positions(rng, preemptions):
    for _ in range(10):
        computed_again = tuple(rng.sample(range(20, 60), preemptions))
        history = some_history(rng, computed_again)
        masks = composed(history)
        assert len(masks) == len(history.held) > 0
        for mask, held in zip(masks, history.held, strict=True):
            assert mask.shape == (history.num_layers, history.num_kv_heads, history.num_tokens)
            for (layer, head), positions in held.items():
                assert [token for token in range(history.num_tokens) if mask[layer, head, token]] == positions


def test_a_request_that_was_computed_again_holds_what_it_had_lost(rng):
    history = random_history(
        rng, num_layers=2, num_kv_heads=2, budget=10, buffer=5, num_tokens=60, computed_again=(40,)
    )
    assert len(history.starts) == 2
    before, after = composed(history)[history.starts[1] - 1 : history.starts[1] + 1]
    assert np.any(after & ~before & (np.arange(60) < history.lengths[history.starts[1] - 1]))


def test_a_request_that_was_never_compacted_has_an_empty_trace():
    assert kept_positions([], 2, 2, 10) == []


@pytest.mark.parametrize("layers, heads", [(3, 2), (2, 3), (1, 1)])
def test_bits_of_another_shape_are_refused(rng, layers, heads):
    packed = random_history(rng, num_layers=2, num_kv_heads=2, budget=9, buffer=8, num_tokens=17).compactions[0]
    with pytest.raises(ValueError, match="damaged"):
        unpack_kept(packed, layers, heads)


def test_a_trace_that_contradicts_itself_is_refused(rng):
    history = random_history(rng, num_layers=2, num_kv_heads=2, budget=9, buffer=8, num_tokens=60)
    first, second, *rest = history.compactions
    short = {**second, "evicted_before": second["evicted_before"] - 1}
    gap = {**second, "evicted_before": second["evicted_before"] + 1}
    empty = base64.b64encode(zlib.compress(bytes(4 * 3))).decode()
    for compactions in (
        [second, first, *rest],
        [second, *rest],
        [first, *rest],
        [first, first, *rest],
        [first, short],
        [first, gap],
        [{**first, "kept": empty}, second],
    ):
        with pytest.raises(ValueError, match="damaged"):
            kept_positions(compactions, 2, 2, history.num_tokens)
    with pytest.raises(ValueError, match="speaks of"):
        kept_positions(history.compactions, 2, 2, history.lengths[-1] - 1)
