"""The freed room is used: admission is exact, generation goes past the pool, and nothing is retracted for memory."""

import os
import random

import pytest

from devtools.tiny_models import tiny_model_path
from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.memory_plan import requests_at_once
from tests.e2e.workload import (
    Setting,
    assert_same_tokens,
    greedy,
    oracle,
    outputs_at_restores,
    random_ids,
    retracting,
    six_prompts,
)
from tests.support.harness.gate import Control
from tests.support.harness.scheduler import Request, run_scheduler

MODEL = tiny_model_path("llama-gqa")
FLAGS = ["--model-path", str(MODEL)]
SETTING = Setting(budget=32, buffer=16)
CAPACITY = SETTING.budget + SETTING.buffer
# Requests, tokens each, and the pool. The long ones take several minutes.
FAR = [(1, 8192, 1024), (8, 4096, 1024)] if os.environ.get("RKV_TEST_FULL_MATRIX") else [(4, 600, 512)]


def pool(num_tokens: int, page_size: int = 1) -> list[str]:
    return ["--max-total-tokens", str(num_tokens), "--page-size", str(page_size)]


@pytest.mark.parametrize("radix", [[], ["--disable-radix-cache"]], ids=["radix", "no-radix"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_requests_generate_more_than_the_pool_holds(page_size, radix):
    prompts = six_prompts()
    requests = [greedy(prompt, 430 if i == 0 else 150) for i, prompt in enumerate(prompts)]
    result = run_scheduler([*FLAGS, *pool(384, page_size), *radix, *SETTING.flags], requests)
    result.assert_clean()
    assert result.probe.retractions == 0
    for prompt, request, output in zip(prompts, requests, result.outputs, strict=True):
        expected = oracle(MODEL, prompt, request.sampling_params["max_new_tokens"], SETTING, output.output_ids)
        assert_same_tokens(output.output_ids, expected, f"prompt of {len(prompt)}")


@pytest.mark.parametrize("num_requests, num_tokens, num_slots", FAR)
def test_answers_far_longer_than_the_pool(num_requests, num_tokens, num_slots):
    setting = Setting(budget=64, buffer=32)
    rng = random.Random(11)
    prompts = [tuple(random_ids(rng, 20)) for _ in range(num_requests)]
    requests = [greedy(prompt, num_tokens) for prompt in prompts]
    flags = [*FLAGS, *pool(num_slots), "--context-length", "9000", *setting.flags]
    result = run_scheduler(flags, requests, timeout=1200)
    result.assert_clean()
    assert result.probe.peak_running == num_requests
    assert result.probe.retractions == 0
    assert all(len(output.output_ids) == num_tokens for output in result.outputs)
    found = result.outputs[0].output_ids
    assert_same_tokens(found, oracle(MODEL, prompts[0], num_tokens, setting, found), "the first")


@pytest.mark.parametrize(
    "page_size, extra",
    [(1, []), (16, ["--disable-radix-cache"]), (16, ["--disable-overlap-schedule"]), (64, [])],
    ids=["1", "16-no-radix", "16-no-overlap", "64"],
)
def test_the_batch_fills_the_pool_and_is_never_retracted(page_size, extra, seed):
    rng = random.Random(seed)
    # With pages of 1 and 16, twelve requests of 32 + 48 tokens fill the pool to its last slot.
    prompt_len, num_requests, pool_size = 32, 24, 960
    requests = [greedy(random_ids(rng, prompt_len), 120) for _ in range(num_requests)]
    result = run_scheduler([*FLAGS, *pool(pool_size, page_size), *extra, *SETTING.flags], requests)
    result.assert_clean()
    assert result.probe.retractions == 0
    config = PolicyConfig(budget=SETTING.budget, buffer=SETTING.buffer)
    planned = requests_at_once(pool_size, prompt_len=prompt_len, output_len=120, page_size=page_size, config=config)
    # Near its end a request needs less than its capacity, so then there may be more of them.
    early = [step for step in result.probe.steps if max(entry["output_len"] for entry in step["running"]) <= 70]
    assert max(len(step["batch"]) for step in early if step["mode"] == "DECODE") == planned
    assert f"it holds {requests_at_once(pool_size, prompt_len=512, output_len=16384, config=config)}" in result.log
    if page_size == 1:
        stock = run_scheduler([*FLAGS, *pool(pool_size)], requests[:12])
        stock.assert_clean()
        assert result.probe.peak_running > 1.5 * stock.probe.peak_running


@pytest.mark.parametrize("extra", [[], ["--disable-radix-cache"], ["--chunked-prefill-size", "32"]])
def test_mixed_lengths_with_and_without_eos_are_never_retracted(extra, seed):
    rng = random.Random(seed)
    page_size = rng.choice([1, 16])
    requests = []
    for i in range(28):
        request = greedy(random_ids(rng, rng.randrange(1, 130)), rng.randrange(1, 180), at_step=rng.randrange(0, 120))
        # Without ignore_eos SGLang expects early ends, so it would take in more than fits.
        request.sampling_params["ignore_eos"] = i % 2 == 0
        requests.append(request)
    result = run_scheduler([*FLAGS, *pool(512, page_size), *extra, *SETTING.flags], requests)
    result.assert_clean()
    assert result.probe.retractions == 0, f"page size {page_size}"
    assert all(len(output.output_ids) > 0 for output in result.outputs)


def test_length_limits_are_those_of_the_model_or_of_the_request():
    flags = [*FLAGS, *pool(256), "--context-length", "400", *SETTING.flags]
    prompt = six_prompts()[0]
    endless = Request(
        input_ids=list(prompt), sampling_params={"temperature": 0, "ignore_eos": True, "max_new_tokens": 100_000}
    )
    some = greedy(prompt, 310)
    # Prompt and capacity together do not fit, so this one is clipped at the pool, as without a policy.
    crowded = greedy(random_ids(random.Random(7), 220), 300)
    results = {}
    for name, these in (("policy", flags), ("stock", flags[: -len(SETTING.flags)])):
        result = run_scheduler(these, [endless, some, crowded])
        result.assert_clean()
        results[name] = [len(output.output_ids) for output in result.outputs]
    assert results["policy"][0] == 400 - 2 - len(prompt)
    assert results["policy"][1] == 310
    assert results["stock"][0] < 256 and results["stock"][1] < 256
    assert results["policy"][2] == results["stock"][2] < CAPACITY


def test_forced_retraction_with_histories_longer_than_the_pool_ends_every_request():
    # SGLang retracts the request with the fewest tokens; of equals, each in its turn.
    requests = [greedy(prompt, 500) for prompt in six_prompts()]
    result = run_scheduler([*FLAGS, *pool(384), *SETTING.flags], requests, env=retracting(61))
    result.assert_clean()
    assert result.probe.retractions >= 6
    assert [len(output.output_ids) for output in result.outputs] == [500] * 6
    assert sum(len(outputs_at_restores(result, f"r{i:05d}")) for i in range(6)) >= 1


def test_shared_prompts_hit_as_without_a_policy_and_unused_nodes_are_evicted(seed):
    rng = random.Random(seed)
    setting = Setting(budget=16, buffer=8)
    shared = [random_ids(rng, 64) for _ in range(4)]
    # One after another: what is found depends on nothing but the tree.
    requests = [greedy(shared[i % 4] + random_ids(rng, 6), 24 - 4, when_idle=True) for i in range(24)]
    hits = {}
    for name, flags in (("policy", setting.flags), ("stock", [])):
        # Of 24 answers less than half fit, so nodes that nobody uses are evicted all the time.
        result = run_scheduler([*FLAGS, *pool(480), *flags], requests)
        result.assert_clean()
        hits[name] = [output.cached_tokens for output in result.outputs]
    assert hits["policy"] == hits["stock"]
    assert sum(hits["policy"]) >= 12 * 64


def test_shared_prompts_of_long_requests_hit_as_without_a_policy(seed):
    rng = random.Random(seed)
    shared = [random_ids(rng, 64) for _ in range(4)]
    # One token each: it is never fed back, so nothing but the prompt gets into the tree.
    requests = [greedy(prompt, 1, when_idle=True) for prompt in shared]
    # All at once, as soon as the four prompts are in the tree. No two go on with the same token, else they would find
    # more, depending on which comes first.
    requests += [greedy([*shared[i % 4], 3 + i, 7, 7], 60, when_idle=i == 0) for i in range(24)]
    hits = {}
    for name, flags in (("policy", SETTING.flags), ("stock", [])):
        result = run_scheduler([*FLAGS, *pool(16384 if name == "stock" else 1024), *flags], requests)
        result.assert_clean()
        hits[name] = [output.cached_tokens for output in result.outputs]
    assert hits["policy"] == hits["stock"] == [0] * 4 + [64] * 24


def test_a_request_of_higher_priority_preempts_one_at_its_budget():
    """SGLang weighs what a running request still reserves; at its budget that is next to nothing."""
    rng = random.Random(3)
    flags = [*FLAGS, *pool(230), "--max-running-requests", "3", "--enable-priority-scheduling"]
    flags += ["--priority-scheduling-preemption-threshold", "0"]
    low = [greedy(random_ids(rng, 20), 180, extra={"priority": 1}) for _ in range(3)]
    high = greedy(random_ids(rng, 20), 60, at_step=60, extra={"priority": 9})
    result = run_scheduler([*flags, *SETTING.flags], [*low, high])
    result.assert_clean()
    assert [len(output.output_ids) for output in result.outputs] == [180] * 3 + [60]
    steps = [[entry["step"] for entry in result.probe.per_request(f"r{i:05d}")] for i in range(4)]
    # It is done before any of the others is.
    assert steps[3][-1] < min(steps[i][-1] for i in range(3))
    assert sum(output.retractions for output in result.outputs) == 1


def test_after_memory_was_released_and_taken_back_answers_are_right():
    """As trainers do it: pool and weights go, weights come back and are new, then the pool comes back, empty."""
    prompt, num_tokens = six_prompts()[5], 100
    # The second would find the first one's prompt, and what stood in its slots.
    requests = [greedy(prompt, num_tokens), greedy(prompt, num_tokens, at_step=170)]
    update = {"model_path": str(MODEL), "load_format": "auto", "flush_cache": True}
    controls = [
        Control(140, "ReleaseMemoryOccupationReqInput"),
        Control(142, "ResumeMemoryOccupationReqInput", {"tags": ["weights", "cuda_graph"]}),
        Control(144, "UpdateWeightFromDiskReqInput", update),
        Control(146, "ResumeMemoryOccupationReqInput", {"tags": ["kv_cache"]}),
    ]
    flags = [*FLAGS, "--enable-memory-saver", *SETTING.flags]
    result = run_scheduler(flags, requests, controls=controls, env={"RKV_STAND_IN_SAVER": "1"})
    result.assert_clean()
    for output in result.outputs:
        expected = oracle(MODEL, prompt, num_tokens, SETTING, output.output_ids)
        assert_same_tokens(output.output_ids, expected, "released")
        assert output.info["kv_compactions"] == len(expected.compactions) > 1
        assert output.cached_tokens == 0
