"""The warm-up of a server that drops blocks: it runs what a compaction runs, and leaves pool and map as they were."""

from types import SimpleNamespace

import pytest
import torch

from rkv_sglang.cache import drop as cache_drop
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.query_window import QueryWindow
from rkv_sglang.config import REQUEST, PolicyConfig
from rkv_sglang.integration.runtime import drop
from rkv_sglang.integration.runtime.parts import Scored
from rkv_sglang.policies import make_policy

NUM_LAYERS, NUM_KV_HEADS, NUM_QO_HEADS, HEAD_DIM, WINDOW = 3, 2, 4, 16, 8


def scored_parts() -> Scored:
    ones = [1.0] * NUM_LAYERS
    keys, values = ([torch.randn(40, NUM_KV_HEADS, HEAD_DIM) for _ in ones] for _ in range(2))
    buffers = KVBuffers.from_layers(keys, values, dtype=torch.float32, key_scales=ones, value_scales=ones)
    window = QueryWindow(
        num_layers=NUM_LAYERS,
        num_rows=3,
        window=WINDOW,
        num_qo_heads=NUM_QO_HEADS,
        head_dim=HEAD_DIM,
        max_requests=5,
        dtype=torch.float32,
        device="cpu",
    )
    window.rings.uniform_()
    return Scored(buffers=buffers, layers=(), query_window=window, first_layer=0)


@pytest.mark.parametrize("policy", ["rkv", "snapkv", "h2o", "keydiff"])
def test_scored_blocks_are_chosen_and_dropped_once_for_both_numbers_of_requests(policy, monkeypatch):
    run_and_compare(policy, scored_parts(), monkeypatch)


@pytest.mark.parametrize("policy", ["random_attention", "random", "streaming_llm"])
def test_drawn_blocks_too(policy, monkeypatch):
    run_and_compare(policy, None, monkeypatch)


def run_and_compare(policy: str, scored: Scored | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PolicyConfig(policy=policy, granularity=REQUEST, budget=48, buffer=32, block=16, window=WINDOW)
    req_to_token = torch.arange(5 * 100, dtype=torch.int32).view(5, 100)
    scheduler = SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(page_size=4),
        req_to_token_pool=SimpleNamespace(req_to_token=req_to_token),
    )
    dropped: list[int] = []
    drop_blocks = cache_drop.drop_blocks

    def counted(rows, *rest):
        assert rows is not req_to_token and rows.dtype == req_to_token.dtype
        freed = drop_blocks(rows, *rest)
        dropped.append(len(freed))
        return freed

    monkeypatch.setattr(cache_drop, "drop_blocks", counted)
    tensors = {} if scored is None else {"keys": scored.buffers.keys.tensors, "rings": [scored.query_window.rings]}
    before = {name: [tensor.clone() for tensor in own] for name, own in tensors.items()}
    drop.warm_up(config, make_policy(config), scheduler, scored)
    assert dropped == [32 // 4, 3 * 32 // 4]
    assert req_to_token.flatten().tolist() == list(range(500))
    for name, own in tensors.items():
        assert all(torch.equal(left, right) for left, right in zip(own, before[name], strict=True)), name
