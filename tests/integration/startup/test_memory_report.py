"""Warnings at start-up name the flag that wastes memory."""

import pytest

from rkv_sglang.integration.startup.memory_report import capacity_warnings


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
