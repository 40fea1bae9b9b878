"""The GPUs that a launch may be for, as SGLang asks after them while it resolves arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rkv_sglang.config import POLICY_FIELD

# Compute capability; none of AMD's has one that SGLang asks for.
NVIDIA = {
    "A100": (8, 0),
    "H100": (9, 0),
    "H200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
    "B300": (10, 3),
    "GB300": (10, 3),
}
AMD = ("MI300X", "MI325X", "MI350X", "MI355X")
# Where SGLang keeps fp8 in AMD's own format, whose bytes mean other numbers.
_OWN_FP8 = ("MI300X", "MI325X")
HARDWARE = (*NVIDIA, *AMD)


def facts_of(hardware: str) -> dict[str, Any]:
    """Return SGLang's platform facts of a GPU, by their names there."""
    major, minor = NVIDIA.get(hardware, (0, 0))
    return {
        "is_cuda": hardware in NVIDIA,
        "is_hip": hardware in AMD,
        **dict.fromkeys(("is_npu", "is_xpu", "is_musa", "is_mps", "is_sm110", "is_sm120", "has_amx"), False),
        "is_sm90": major == 9,
        "is_hopper_with_cuda_12_3": major == 9,
        "is_sm100": major == 10,
        "is_sm100_or_sm110": major == 10,
        "is_blackwell": major == 10,
        "has_flashinfer": hardware in NVIDIA,
        "device_sm": 10 * major + minor,
        "device_capability": (major, minor),
    }


def fp8_problems(view: Any, hardware: str | None, *, asks_for_fp8: bool) -> Iterator[str]:
    """Yield why a KV pool in fp8 would be refused on this GPU, by the scheduler that builds it.

    Args:
        view: SGLang's resolved view of the arguments of a server with a policy.
        hardware: The GPU; None if it is not known.
        asks_for_fp8: Whether the checkpoint asks for fp8 where the arguments leave it open.
    """
    dtype, policy = str(view.kv_cache_dtype), getattr(view, POLICY_FIELD)
    is_fp8 = dtype.startswith("fp8") or (dtype == "auto" and asks_for_fp8)
    if hardware in _OWN_FP8 and is_fp8:
        yield (
            f"--kv-cache-dtype {dtype} cannot be combined with --kv-policy {policy}: on {hardware} the KV "
            "pool would store float8_e4m3fnuz, whose numbers the policy cannot read; set --kv-cache-dtype bfloat16"
        )


@contextlib.contextmanager
def as_on(hardware: str | None) -> Iterator[None]:
    """Have SGLang resolve arguments as on a machine with this GPU, for the while; None is the machine itself."""
    if hardware is None:
        yield
        return
    import torch
    from sglang.srt.runtime_context import override_platform

    facts = facts_of(hardware)
    # A few places ask torch directly.
    asked = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda *_, **__: facts["device_capability"]
    try:
        with override_platform(**facts):
            yield
    finally:
        torch.cuda.get_device_capability = asked
