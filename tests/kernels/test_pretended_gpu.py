"""On a device that exists in name alone: nothing is mixed with CPU tensors there, and nothing waits for it.

Tensors without numbers, of torch's ``FakeTensorMode``, stand for a GPU's, and no kernel runs. What a kernel computes
is tested elsewhere; this is about the Python around it, for which a CPU and a GPU differ in nothing else.
"""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from rkv_sglang.algorithm import document_attention
from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.cache import compact, prompt
from rkv_sglang.cache.block_choice import BlockChoice, choose_by_scores
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest
from rkv_sglang.cache.drop import drop_blocks
from rkv_sglang.config import BY_REPEAT, BY_TASK, REQUEST, PolicyConfig
from rkv_sglang.integration.runtime.prefixes.judging import DocumentAttention
from rkv_sglang.kernels import dispatch, warmup
from rkv_sglang.kernels.transfer import sent
from rkv_sglang.policies import POLICIES, granularities_of, is_blind, make_policy
from rkv_sglang.policies.base import ScoreInputs, as_scored
from rkv_sglang.sizes.compaction_plan import plan_drop
from rkv_sglang.sizes.prompt_plan import PrefixPlan, PromptPlan
from tests.kernels import test_gpu
from tests.policies.cases import model_with_statistics

BACKEND = "pretended"
DEVICE = f"{BACKEND}:0"
WINDOW = test_gpu.WINDOW
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
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make ``DEVICE`` the GPU that this package runs kernels on; return the names of those that were to run."""
    names: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: names.append(kernel.fn.__name__))
    for module in (dispatch, compact, warmup, prompt):
        monkeypatch.setattr(module, "runs_triton", lambda buffers: True)
    monkeypatch.setattr(prompt, "_best_torch", prompt._best_paged)
    monkeypatch.setattr(test_gpu, "DEVICE", DEVICE)
    with FakeTensorMode():
        yield names


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_compaction_stays_on_its_device_and_waits_for_nothing(seed: int, name: str, launched: list[str]) -> None:
    _, _, run = test_gpu.served(seed, 5)
    policy = make_policy(PolicyConfig(policy=name))
    with NoWaitingCopy():
        run(policy)
    assert {"_select_kept_kernel", "_move_kept_kernel"} <= set(launched)


@pytest.mark.parametrize(
    "name", [name for name, policy in POLICIES.items() if REQUEST in granularities_of(policy) and not is_blind(policy)]
)
def test_a_choice_of_blocks_stays_on_its_device_and_waits_for_nothing(
    seed: int, name: str, launched: list[str]
) -> None:
    case = test_gpu.Case(seed, torch.bfloat16)
    requests = [
        DueRequest(
            plan_drop(prompt_len=prompt_len, resident_len=len(own), budget=budget - 40, window=WINDOW, block=16),
            own,
            len(own) + 7,
        )
        for own, prompt_len, budget in zip(case.slots.split(case.kv_lens), case.prompt_lens, case.budgets, strict=True)
    ]
    model, policy = test_gpu.some_model(), make_policy(PolicyConfig(policy=name))
    with NoWaitingCopy():
        choices = choose_by_scores(
            case.buffers, requests, lambda part, layers: case.queries[layers, part], policy, WINDOW, model=model
        )
    assert launched
    assert all(own.kept.device == own.dropped.device == torch.device(DEVICE) for own in choices)


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_blocks_that_were_chosen_anywhere_leave_a_row_and_nothing_waits(device: str, launched: list[str]) -> None:
    plan = plan_drop(prompt_len=9, resident_len=9 + 64 + 32, budget=64, window=WINDOW, block=16)
    counts = (plan.num_kept, plan.num_dropped)
    choice = BlockChoice(*(torch.zeros(count, dtype=torch.int64, device=device) for count in counts))
    req_to_token = torch.zeros(4, 128, dtype=torch.int32, device=DEVICE)
    with NoWaitingCopy():
        freed = drop_blocks(req_to_token, [3, 1], [plan] * 2, [choice] * 2, page_size=1)
    assert freed.shape == (2 * 32,) and freed.device == torch.device(DEVICE)
    # No kernel of this package.
    assert launched == []


class StandIn:
    """In the place of a tensor: remembers how it is brought to a device."""

    def __init__(self, device: str, pinned: bool = False) -> None:
        self.device, self.pinned = torch.device(device), pinned
        self.copies: list[tuple[bool, bool]] = []

    def is_pinned(self) -> bool:
        return self.pinned

    def pin_memory(self) -> "StandIn":
        self.pinned = True
        return self

    def to(self, device: torch.device, non_blocking: bool) -> "StandIn":
        self.copies.append((self.pinned, non_blocking))
        return self


@pytest.mark.parametrize(
    ("source", "target", "is_pinned"), [("cpu", "cuda:0", True), ("cpu", "cpu", False), ("cuda:0", "cuda:0", False)]
)
def test_what_goes_to_a_gpu_comes_from_memory_that_nothing_is_waited_for(source, target, is_pinned) -> None:
    tensor = StandIn(source)
    sent(tensor, torch.device(target))  # type: ignore[arg-type]
    assert tensor.copies == [(is_pinned, True)]


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_compacted_prompt_stays_on_its_device_and_waits_for_nothing(
    seed: int, name: str, launched: list[str]
) -> None:
    case = test_gpu.Case(seed, torch.bfloat16)
    plans = [PromptPlan(length - 3 * WINDOW, length, 5 * WINDOW) for length in case.kv_lens]
    requests = [
        DueRequest(plan, own, len(own)) for plan, own in zip(plans, case.slots.split(case.kv_lens), strict=True)
    ]
    new_slots = [own[: plan.kept_len] for plan, own in zip(plans, case.slots.split(case.kv_lens), strict=True)]
    model, policy = test_gpu.some_model(), make_policy(PolicyConfig(policy=name))
    with NoWaitingCopy():
        prompt.compact_prompts(
            case.buffers,
            requests,
            new_slots,
            lambda part, layers: case.queries[layers, part],
            policy,
            WINDOW,
            model=model,
        )
    assert {"_select_kept_kernel", "_move_kept_kernel"} <= set(launched)


@pytest.mark.parametrize("judge", [BY_TASK, BY_REPEAT])
def test_a_judged_document_stays_on_its_device_and_waits_for_nothing(
    seed: int, judge: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks and chunks of everything.
    monkeypatch.setattr(document_attention, "JUDGING_BYTES", 2**14)
    monkeypatch.setattr(document_attention, "REPEAT_CHUNK", 20)
    num_layers, num_slots, num_kv_heads, head_dim, length, input_len = 2, 200, 2, 32, 40, 84
    sides = [[torch.zeros(num_slots, num_kv_heads, head_dim, device=DEVICE)] * num_layers for _ in "kv"]
    ones = [1.0] * num_layers
    buffers = KVBuffers.from_layers(*sides, dtype=torch.float32, key_scales=ones, value_scales=ones)
    pool: Any = SimpleNamespace(
        buffers=buffers, attention=ModelAttention(), follow_scales=lambda: buffers.set_scales(ones, ones)
    )
    req_to_token = torch.zeros(3, 90, dtype=torch.int32, device=DEVICE)
    req = SimpleNamespace(kv=SimpleNamespace(req_pool_idx=1))
    first = length if judge == BY_TASK else input_len - length
    judging = DocumentAttention(judge, length, first, input_len, pool, req_to_token, req)
    slots = torch.arange(1, num_slots, device=DEVICE)
    with NoWaitingCopy():
        for place in range(0, input_len, 60):
            queries = torch.randn(min(60, input_len - place), 2 * num_kv_heads, head_dim, device=DEVICE)
            for layer in range(num_layers):
                judging.see(layer, queries, place)
        judging.finish()
        verdict = judging.verdict(make_policy(PolicyConfig()), WINDOW)
        prompt.compact_prompts(
            buffers,
            [DueRequest(PrefixPlan(length, verdict.resident_len, 30), slots[:length], length)],
            [slots[-30:]],
            lambda part, layers: verdict.queries[layers, None],
            verdict.policy,
            WINDOW,
        )
    assert judging.is_complete and launched
    assert set(launched) <= {"_select_kept_kernel", "_move_kept_kernel"}


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.usefixtures("launched")
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
