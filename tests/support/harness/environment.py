"""The environment and the flags that every SGLang process of the tests gets."""

import ctypes
import os
import signal
from pathlib import Path

import torch

PROJECT_ROOT = Path(__file__).resolve().parents[3]
PROBE_DIR = PROJECT_ROOT / "tests" / "support" / "probe"

# SGLang's own checks: pool accounting at every step, page ownership, lengths. They raise in the scheduler.
STRICT_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "2",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_DEBUG_MEMORY_POOL": "1",
}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
# The test runner has two workers, each with a server; on two cores, spinning OpenMP threads would starve each other.
NUM_THREADS = 1


def has_gpu() -> bool:
    return torch.cuda.is_available()


# The oracle computes in fp32, and its near-ties are those of fp32 summed in another order: a thousand times closer than
# 16 bits can tell apart. SGLang's CUDA kernels for norms and activations take 16-bit numbers only.
ORACLE_APPLIES = not has_gpu()
WHY_NOT = (
    "on a GPU SGLang computes in 16 bits, and the oracle's near-ties are those of fp32: hide the GPU "
    "(CUDA_VISIBLE_DEVICES=) with SGLang's CPU build installed, or run bash benchmarks/gpu/serving.sh, which compares "
    "what a GPU answers"
)


def child_environment(probe_file: Path | None = None, env: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment of an SGLang process: strict checks on, no network, the probe writing to ``probe_file``.

    ``env`` comes last and may overrule all of it; an empty value removes a variable.
    """
    merged = dict(os.environ)
    # The outer process may itself be watched; only its own file counts here.
    for name in [name for name in merged if name.startswith("RKV_PROBE_")]:
        del merged[name]
    merged.update(STRICT_CHECKS)
    merged.update(_OFFLINE)
    merged["PYTHONUNBUFFERED"] = "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        merged[name] = str(NUM_THREADS)
    merged["TOKENIZERS_PARALLELISM"] = "false"
    inherited = [merged["PYTHONPATH"]] if merged.get("PYTHONPATH") else []
    merged["PYTHONPATH"] = os.pathsep.join([str(PROBE_DIR), str(PROJECT_ROOT), *inherited])
    if not has_gpu():
        merged["SGLANG_USE_CPU_ENGINE"] = "1"
    if probe_file is not None:
        merged["RKV_PROBE_FILE"] = str(probe_file)
    merged.update(env or {})
    return {name: value for name, value in merged.items() if value != ""}


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies, however that happens."""
    pr_set_pdeathsig = 1
    ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, number)


def device_flags() -> list[str]:
    """Return the flags that make SGLang run on what this machine has, as much alike everywhere as can be.

    On a GPU the dtype is one that its kernels take, whatever a model's files say, and attention and sampling are those
    that need no library beside SGLang.
    """
    if has_gpu():
        return ["--dtype", "bfloat16", "--attention-backend", "triton", "--sampling-backend", "pytorch"]
    return ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"]


def with_defaults(flags: list[str], defaults: list[str]) -> list[str]:
    """Return ``defaults`` (flag, value pairs) without those that ``flags`` names itself, then ``flags``."""
    given = {flag.split("=", 1)[0] for flag in flags}
    pairs = zip(defaults[::2], defaults[1::2], strict=True)
    return [word for flag, value in pairs if flag not in given for word in (flag, value)] + flags
