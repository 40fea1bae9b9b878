"""Warnings at start-up name the flag that wastes memory."""

import pytest

from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.startup.memory_report import capacity_warnings, pool_warnings


@pytest.mark.parametrize(
    "count, max_running_requests, max_graph_bs, flags",
    [
        (40, 64, None, []),
        (40, 40, 40, []),
        (40, 39, None, ["--max-running-requests 40"]),
        (40, 64, 32, ["--cuda-graph-max-bs-decode 40"]),
        (40, 36, 32, ["--max-running-requests 40", "--cuda-graph-max-bs-decode 36"]),
    ],
)
def test_warnings_name_the_flag_and_its_value(count, max_running_requests, max_graph_bs, flags):
    warnings = capacity_warnings(count, max_running_requests=max_running_requests, max_graph_bs=max_graph_bs)
    assert len(warnings) == len(flags)
    for warning, flag in zip(warnings, flags, strict=True):
        assert warning.endswith(f"set {flag}") and "\n" not in warning


@pytest.mark.parametrize(("pool_size", "is_warned"), [(1, True), (47, True), (48, True), (49, False), (10**9, False)])
def test_a_pool_in_which_nothing_can_be_compacted_is_warned_of(pool_size, is_warned):
    config = PolicyConfig(budget=32, buffer=16)
    warnings = pool_warnings(config, pool_size)
    assert len(warnings) == is_warned
    for warning in warnings:
        assert f"pool of {pool_size} tokens" in warning and "--kv-budget 32 plus --kv-buffer 16" in warning
        assert "\n" not in warning and "set them lower" in warning
