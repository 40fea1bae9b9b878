"""The warm-up compiles what requests will need, once and for all, and leaves a CPU alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rkv_sglang.kernels.paged_batch import PagedBuffers
from rkv_sglang.kernels.warmup import warm_up
from rkv_sglang.policies import RKV

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("_capture_queries_kernel", "_move_kept_kernel", "_select_kept_kernel")
QUERY_PASSES = ("summarise_blocks_kernel", "reduce_blocks_kernel", "score_tokens_kernel")
RUN = {
    "rkv": (*SHARED, *QUERY_PASSES, "scan_rows_kernel", "combine_scores_kernel"),
    "snapkv": (*SHARED, *QUERY_PASSES, "combine_scores_kernel"),
    "keydiff": (*SHARED, "sum_keys_kernel", "mean_keys_kernel", "compare_keys_kernel"),
    "manifoldkv": (*SHARED, "far_from_mean_kernel"),
    "gkv": (*SHARED, *QUERY_PASSES, "score_by_memory_kernel"),
    "half": (*SHARED, *QUERY_PASSES, "share_out_kernel"),
    "triattention": (*SHARED, "expect_attention_kernel"),
    "beaconkv": (*SHARED, "choose_farthest_kernel", "attend_from_beacons_kernel"),
    "thinkv": (*SHARED, "choose_representatives_kernel"),
    "longflow": (*SHARED, *QUERY_PASSES, "weigh_by_values_kernel"),
}


# Shapes whose strides are divisible by 16 for some numbers of requests only: head_dim, window, KV heads, group size.
UNEVEN = [(72, 5, 1, 1), (120, 7, 3, 1), (72, 5, 1, 5), (80, 8, 5, 3), (96, 1, 1, 7), (64, 8, 3, 3)]


# The other policies run a part of the same kernels, or none.
CASES = [*((policy, ()) for policy in RUN), *(("rkv", shape) for shape in UNEVEN), ("longflow", UNEVEN[1])]


@pytest.fixture(scope="module")
def counts() -> dict[tuple, list[dict[str, int]]]:
    """Return of each case the kernels compiled by the warm-up, and by all that came then."""
    # A process of its own: in this one kernels are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [",".join(map(str, (policy, *shape))) for policy, shape in CASES]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.count_variants", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("policy", "shape"), CASES, ids=str)
def test_no_batch_needs_a_kernel_that_the_warm_up_did_not_compile(counts, policy, shape):
    after_warm_up, at_the_end = counts[policy, shape]
    assert len(after_warm_up) >= 11 and all(after_warm_up[name] for name in RUN[policy])
    assert at_the_end == after_warm_up


def test_on_a_cpu_the_warm_up_touches_nothing():
    pool = torch.full((4, 2, 8), torch.nan)
    buffers = PagedBuffers.from_tensors([pool])
    rings = torch.full((1, 2, 2, 4, 8), torch.nan)
    warm_up(buffers, buffers, rings, torch.zeros(3, dtype=torch.int64), RKV(), budget=8, capacity=12)
    assert pool.isnan().all() and rings.isnan().all()
