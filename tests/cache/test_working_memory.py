"""However long a request is, its compaction allocates no more at a time than is allowed."""

from typing import Any

import pytest
import torch

from rkv_sglang.cache import compact
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import WORKING_BYTES, DueRequest, compact_requests
from rkv_sglang.kernels import dispatch, move, select
from rkv_sglang.kernels.score import attention, scan
from rkv_sglang.policies import RKV
from rkv_sglang.sizes.compaction_plan import plan_compaction

# Llama-3.1-8B.
NUM_LAYERS, NUM_KV_HEADS, NUM_QO_HEADS, HEAD_DIM, WINDOW = 32, 8, 32, 128, 8
BUDGET = 1024
KERNELS = {
    attention: ("summarise_blocks_kernel", "reduce_blocks_kernel", "score_tokens_kernel", "combine_scores_kernel"),
    scan: ("scan_rows_kernel",),
    select: ("_select_kept_kernel",),
    move: ("_move_kept_kernel",),
}


class NoLaunch:
    """In the place of a kernel: nothing here is written, so nothing takes memory but in name."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("resident_lens", [[131072], [1664] * 40, [1664, 131072, 1664], [700_000]], ids=str)
def test_a_part_allocates_at_most_what_is_allowed(resident_lens, monkeypatch):
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, NoLaunch())
    for module in (compact, dispatch):
        monkeypatch.setattr(module, "runs_triton", lambda buffers: True)
    parts: list[list[Any]] = []

    def counting(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = make(*args, **kwargs)
            parts[-1][1] += tensor.nbytes
            return tensor

        return made

    def compact_and_count(keys: Any, values: Any, batch: Any, queries: Any, *args: Any) -> Any:
        assert keys.num_layers == values.num_layers == len(queries) == len(keys.pointers) == len(values.scales)
        parts.append([keys.num_layers, queries.nbytes, batch.num_tokens])
        with monkeypatch.context() as patch:
            for name in ("empty", "zeros"):
                patch.setattr(torch, name, counting(getattr(torch, name)))
            return compact_paged(keys, values, batch, queries, *args)

    compact_paged = compact.compact_paged
    monkeypatch.setattr(compact, "compact_paged", compact_and_count)
    layer = torch.empty(1 + max(resident_lens), NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    sides, ones = [layer] * NUM_LAYERS, [1.0] * NUM_LAYERS
    buffers = KVBuffers.from_layers(sides, sides, dtype=torch.bfloat16, key_scales=ones, value_scales=ones)
    requests = []
    for resident_len in resident_lens:
        plan = plan_compaction(prompt_len=512, resident_len=resident_len, budget=BUDGET, page_size=1)
        requests.append(DueRequest(plan, torch.zeros(resident_len, dtype=torch.int64), resident_len))
    rings = torch.empty(NUM_LAYERS, len(requests), WINDOW, NUM_QO_HEADS, HEAD_DIM, dtype=torch.bfloat16)

    results = compact_requests(
        buffers,
        requests,
        lambda part, layers: rings[layers, part],
        RKV(),
        WINDOW,
        query_bytes=NUM_LAYERS * rings[0, 0].nbytes,
    )

    assert len(results) == len(requests)
    assert max(num_bytes for _, num_bytes, _ in parts) <= WORKING_BYTES
    # Nor is it cut into pieces much smaller than need be.
    assert max(num_bytes for _, num_bytes, _ in parts) >= WORKING_BYTES // 2
    # Every token of every layer, once.
    assert sum(layers * num_tokens for layers, _, num_tokens in parts) == NUM_LAYERS * sum(resident_lens)
