"""Equal memory for every server of the serving benchmark, and what a setting's name means."""

import random

import pytest

from benchmarks.serving.servers import (
    STOCK,
    carried_bytes,
    parse_setting,
    policy_pool,
    pool_flags,
    query_window_bytes,
)
from devtools.launch import has_gpu
from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.memory_plan import ModelShape

SHAPE = ModelShape(
    num_layers=3, num_qo_heads=4, num_kv_heads=2, head_dim=32, v_head_dim=32, kv_itemsize=4, query_itemsize=4
)


@pytest.mark.parametrize("policy", ["rkv", "h2o"])
def test_a_policy_gets_the_most_tokens_that_fit_with_its_buffers(policy: str, rng: random.Random) -> None:
    config = PolicyConfig(policy=policy, budget=rng.randint(9, 200), buffer=rng.randint(1, 100))
    pool, max_requests = rng.randint(2000, 40000), rng.randint(8, 512)

    def num_bytes(tokens: int) -> int:
        own = query_window_bytes(SHAPE, config, tokens, max_requests) + carried_bytes(SHAPE, config, tokens)
        return tokens * SHAPE.kv_bytes + own

    tokens = policy_pool(SHAPE, config, pool, max_requests)
    assert num_bytes(tokens) <= pool * SHAPE.kv_bytes < num_bytes(tokens + 1)


def test_a_query_window_worked_out_by_hand() -> None:
    # Rows of 3 layers * 8 queries * 4 heads * 32 numbers * 4 bytes = 12,288; 567 // (40 - 8) = 17 rows and the unread
    # one; a map of 65 requests. A server of this size reported 221,704 bytes.
    config = PolicyConfig(policy="rkv", budget=24, buffer=16)
    assert query_window_bytes(SHAPE, config, 567, 64) == 18 * 12288 + 65 * 8 == 221704


def test_only_stateful_policies_carry_scores() -> None:
    assert carried_bytes(SHAPE, PolicyConfig(policy="rkv", budget=24, buffer=16), 400) == 0
    # 10 requests of 3 layers * 2 heads * 16 numbers of 4 bytes.
    assert carried_bytes(SHAPE, PolicyConfig(policy="h2o", budget=24, buffer=16), 400) == 10 * 3 * 2 * 16 * 4


def test_settings() -> None:
    rkv = parse_setting("rkv:64:32")
    assert rkv.config == PolicyConfig(policy="rkv", budget=64, buffer=32)
    assert rkv.flags == ("--kv-policy", "rkv", "--kv-budget", "64", "--kv-buffer", "32")
    assert parse_setting("none").flags == () and parse_setting("none").config is None
    assert parse_setting(STOCK).environment == {"SGLANG_PLUGINS": "no_plugin"}
    for wrong in ("rkv", "rkv:64", "rkv:4:4", "nonsense:64:32", "rkv:a:b"):
        with pytest.raises(ValueError, match=wrong):
            parse_setting(wrong)


def test_a_staggered_setting_is_the_same_server_with_one_flag_more() -> None:
    plain, staggered = parse_setting("rkv:64:32"), parse_setting("rkv:64:32:stagger")
    assert sorted(staggered.flags) == sorted((*plain.flags, "--kv-stagger"))
    assert staggered.name == "rkv:64:32:stagger" and staggered.config is not None and staggered.config.stagger
    for text in ("none:stagger", "rkv:64:stagger", "rkv:64:32:staggered"):
        with pytest.raises(ValueError, match="the setting"):
            parse_setting(text)


@pytest.mark.skipif(has_gpu(), reason="on a GPU fp8 is served")
def test_fp8_is_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="GPU"):
        parse_setting("fp8")


def test_pool_flags() -> None:
    rkv = parse_setting("rkv:64:32")
    # SGLang divides a share of the GPU's memory, and the plugin takes its buffers off.
    assert pool_flags(rkv, 0.8, SHAPE, 64) == ("--mem-fraction-static", "0.8")
    assert pool_flags(parse_setting("none"), 4096, SHAPE, 64) == ("--max-total-tokens", "4096")
    assert rkv.config is not None
    assert pool_flags(rkv, 4096, SHAPE, 64)[1] == str(policy_pool(SHAPE, rkv.config, 4096, 64))
