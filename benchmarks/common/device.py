"""The GPU that kernels are tested and timed on, or in a rehearsal Triton's interpreter on a CPU in its place.

A rehearsal (environment variable ``RKV_REHEARSE=1``) runs every line of what a GPU will run, at tiny sizes, so that
none of them runs for the first time there. What it cannot do is faked here and nowhere else: a graph is a call of what
it would replay, memory and time are not the GPU's, and nothing can wait for a device.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton

REHEARSAL = os.environ.get("RKV_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"


def stand_in_for_gpu(setattr_: Callable[[object, str, object], None] = setattr) -> None:
    """Let this package run its Triton kernels on CPU tensors; does nothing unless this is a rehearsal.

    Args:
        setattr_: Replaces an attribute, as ``setattr`` or as pytest's ``monkeypatch.setattr`` does.
    """
    if REHEARSAL:
        from rkv_sglang.cache import compact
        from rkv_sglang.kernels import dispatch, warmup

        for module in (dispatch, compact, warmup):
            setattr_(module, "runs_triton", lambda buffers: True)
        setattr_(torch.cuda, "synchronize", lambda device=None: None)


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """Return the replay of a CUDA graph that was captured while ``step`` ran."""
    step()
    if REHEARSAL:

        def replay() -> None:
            step()

        return replay
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def no_wait() -> Iterator[None]:
    """Let whatever waits for the device within this block raise."""
    if REHEARSAL:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Return the most GPU memory held at once during the call beyond what was held before; 1 in a rehearsal."""
    if REHEARSAL:
        run()
        return 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def gpu_times(run: Callable[[], object], rep_ms: int = 100) -> tuple[float, float, float]:
    """Return the quantiles of one call's GPU time in ms; the L2 cache is cleared before each."""
    if REHEARSAL:
        start = time.perf_counter()
        run()
        elapsed = (time.perf_counter() - start) * 1e3
        return elapsed, elapsed, elapsed
    p20, p50, p80 = triton.testing.do_bench(run, warmup=25, rep=rep_ms, quantiles=[0.2, 0.5, 0.8])
    return p20, p50, p80
