"""Query rows: never too few for what a pool holds, and a small share of its bytes."""

import random

import pytest

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.query_rows import num_query_rows, query_bytes_per_slot


@pytest.mark.parametrize("seed", range(5))
def test_the_rows_suffice_in_lockstep_and_are_a_small_share_of_the_pool(seed):
    rng = random.Random(seed)
    budget = rng.randint(128, 2048)
    config = PolicyConfig(budget=budget, buffer=rng.randint(1, budget))
    num_slots = rng.randint(10_000, 1_000_000)
    rows = num_query_rows(config, num_slots, max_running_requests=10**9)
    # Requests that need a row hold capacity - window slots each, so no more than this many exist.
    assert rows >= num_slots // (config.capacity - config.window)
    per_slot = query_bytes_per_slot(config, num_layers=32, num_qo_heads=32, head_dim=128, itemsize=2)
    buffer_bytes = rows * 32 * config.window * 32 * 128 * 2
    assert buffer_bytes <= per_slot * num_slots


def test_the_default_settings_cost_less_than_two_percent_of_a_gqa_pool():
    config = PolicyConfig()
    kv_bytes_per_slot = 2 * 32 * 8 * 128 * 2
    assert query_bytes_per_slot(config, 32, 32, 128, 2) / kv_bytes_per_slot < 0.015
