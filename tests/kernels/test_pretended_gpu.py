"""On a device that exists in name alone: nothing is mixed with CPU tensors there, and nothing waits for it.

Tensors without numbers, of torch's ``FakeTensorMode``, stand for a GPU's, and no kernel runs. What a kernel computes
is tested elsewhere; this is about the Python around it, for which a CPU and a GPU differ in nothing else.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.cache import compact
from rkv_sglang.config import PolicyConfig
from rkv_sglang.kernels import dispatch, warmup
from rkv_sglang.policies import POLICIES, make_policy
from rkv_sglang.policies.base import ScoreInputs, as_scored
from tests.kernels import test_gpu
from tests.policies.cases import model_with_statistics

BACKEND = "pretended"
DEVICE = f"{BACKEND}:0"
# Their scores in torch list what they find.
LISTING = ("rkv", "gkv", "half", "beaconkv")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class NoWaitingCopy(TorchDispatchMode):
    """Raise on a copy between devices that the CPU would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COPIES:
            target = kwargs.get("device") or args[0].device
            source = args[1].device if func is COPIES[1] else args[0].device
            is_waited_for = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            if is_waited_for and torch.device(target).type != source.type:
                raise AssertionError(f"a copy from {source} to {target} is waited for")
        return func(*args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def backend() -> None:
    set_up = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if set_up is None:
        pytest.skip("this torch knows no device that is written in Python")
    if not hasattr(torch, BACKEND):
        set_up(BACKEND)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make ``DEVICE`` the GPU that this package runs kernels on."""
    launched: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
    for module in (dispatch, compact, warmup):
        monkeypatch.setattr(module, "runs_triton", lambda buffers: True)
    monkeypatch.setattr(test_gpu, "DEVICE", DEVICE)
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.usefixtures("gpu")
def test_a_compaction_stays_on_its_device_and_waits_for_nothing(seed: int, name: str) -> None:
    _, _, run = test_gpu.served(seed, 5)
    policy = make_policy(PolicyConfig(policy=name))
    with NoWaitingCopy():
        run(policy)


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.usefixtures("gpu")
def test_scores_in_torch_stay_on_their_device_and_wait_for_nothing(name: str) -> None:
    window, num_tokens, num_kv_heads, head_dim = 8, 90, 2, 64
    model = model_with_statistics(3, 2 * num_kv_heads, head_dim)
    assert model.statistics is not None
    statistics = QueryStatistics(model.statistics.means.to(DEVICE), model.statistics.mean_lengths.to(DEVICE))
    inputs = ScoreInputs(
        queries=torch.randn(window, 2 * num_kv_heads, head_dim, device=DEVICE),
        keys=torch.randn(num_tokens, num_kv_heads, head_dim, device=DEVICE),
        values=torch.randn(num_tokens, num_kv_heads, head_dim, device=DEVICE),
        prompt_len=20,
        logical_len=num_tokens + 5,
        layer=1,
        budget=40,
        model=replace(model, statistics=statistics),
    )
    policy = make_policy(PolicyConfig(policy=name))
    try:
        with NoWaitingCopy():
            scores = as_scored(policy.score(inputs)).scores
    except DynamicOutputShapeException:
        # What is found there decides a shape: kernels do without.
        assert name in LISTING
    else:
        assert scores.device == torch.device(DEVICE)
