"""A retracted request whose history is longer than the pool comes back with the KV it had kept, and goes on with it."""

import random
import re

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import (
    Setting,
    assert_same_tokens,
    greedy,
    outputs_at_restores,
    outputs_at_retractions,
    random_ids,
    retracting,
)
from tests.support.harness.gate import Control
from tests.support.harness.scheduler import RunResult, rid_of, run_scheduler
from tests.support.oracle.dense import DenseResult, dense_generate
from tests.support.oracle.policy_scores import score_function

MODEL = tiny_model_path("llama-gqa")
FLAGS = ["--model-path", str(MODEL)]
SETTING = Setting(budget=24, buffer=16)
NO_OVERLAP = "--disable-overlap-schedule"


# Slots in which three requests just run, by page size, and steps after which one has seen more than they hold.
POOLS = {1: (182, 157), 16: (208, 211), 64: (384, 401)}


def pool(num_tokens: int, page_size: int = 1) -> list[str]:
    return ["--max-total-tokens", str(num_tokens), "--page-size", str(page_size)]


def some_prompts(*lengths: int, seed: int = 7) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(random_ids(rng, length)) for length in lengths]


def restores_of(result: RunResult) -> list[list[int]]:
    """Return after how many output tokens each request was restored; none was ever retracted for lack of memory."""
    assert "KV cache pool is full" not in result.log
    restores = [outputs_at_restores(result, rid_of(i)) for i in range(len(result.outputs))]
    assert sum(map(len, restores)) == len(re.findall("Restored request", result.log))
    return restores


def expected_of(
    result: RunResult, index: int, prompt: tuple[int, ...], num_tokens: int, *, overlap: bool = True, **fields: object
) -> DenseResult:
    """Return what the oracle answers that is retracted, recomputed and restored at the same tokens."""
    return dense_generate(
        MODEL,
        prompt,
        num_tokens,
        guessed_output_ids=result.outputs[index].output_ids,
        budget=SETTING.budget,
        buffer=SETTING.buffer,
        recompute_at=outputs_at_retractions(result, rid_of(index)),
        restore_at=outputs_at_restores(result, rid_of(index)),
        restored_in_flight=overlap,
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "page_size, extra",
    [
        (1, []),
        (1, [NO_OVERLAP]),
        (16, []),
        (16, [NO_OVERLAP, "--disable-radix-cache"]),
        (1, ["--disable-radix-cache", "--chunked-prefill-size", "32"]),
        (64, []),
    ],
    ids=["1", "1-no-overlap", "16", "16-no-overlap-no-radix", "1-no-radix-chunks", "64"],
)
def test_forced_retraction_beyond_the_pool_ends_every_request_as_the_oracle_says(page_size, extra):
    num_slots, interval = POOLS[page_size]
    num_tokens = 2 * interval + 30
    prompts = some_prompts(30, 20, 12)
    # What starts as the others do is shared with them.
    prompts.append((*prompts[0][:17], 5, 6, 7))
    requests = [greedy(prompt, num_tokens if i < 3 else 40) for i, prompt in enumerate(prompts)]
    flags = [*FLAGS, *pool(num_slots, page_size), *extra, *SETTING.flags]
    result = run_scheduler(flags, requests, env=retracting(interval))
    result.assert_clean()
    restores = restores_of(result)
    assert sum(map(len, restores)) >= 2
    for i, (prompt, request, output) in enumerate(zip(prompts, requests, result.outputs, strict=True)):
        length = request.sampling_params["max_new_tokens"]
        assert output.finish_reason == {"type": "length", "length": length}
        assert output.retractions == len(restores[i]) + len(outputs_at_retractions(result, rid_of(i)))
        expected = expected_of(result, i, prompt, length, overlap=NO_OVERLAP not in extra)
        assert_same_tokens(output.output_ids, expected, f"request {i}, restored at {restores[i]}")


def test_log_probabilities_go_on_over_a_restore():
    prompts = some_prompts(30, 20, 12)
    starts = (0, -1, 7)
    requests = [
        greedy(prompt, 345, return_logprob=True, logprob_start_len=start)
        for prompt, start in zip(prompts, starts, strict=True)
    ]
    num_slots, interval = POOLS[1]
    result = run_scheduler([*FLAGS, *pool(num_slots), *SETTING.flags], requests, env=retracting(interval))
    result.assert_clean()
    assert sum(map(len, restores_of(result))) >= 2
    for i, (prompt, start, output) in enumerate(zip(prompts, starts, result.outputs, strict=True)):
        expected = expected_of(result, i, prompt, 345)
        expected = assert_same_tokens(output.output_ids, expected, f"request {i}")
        assert output.output_logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        assert len(output.input_logprobs) == (0 if start < 0 else len(prompt) - start)


def test_a_stateful_policy_remembers_over_a_restore():
    prompts = some_prompts(30, 20, 12, seed=8)
    num_slots, interval = POOLS[1]
    flags = [*FLAGS, *pool(num_slots), *SETTING.flags, "--kv-policy", "h2o"]
    result = run_scheduler(flags, [greedy(prompt, 345) for prompt in prompts], env=retracting(interval))
    result.assert_clean()
    assert sum(map(len, restores_of(result))) >= 2
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        expected = expected_of(result, i, prompt, 345, score=score_function("h2o"))
        assert_same_tokens(output.output_ids, expected, f"request {i}")


PRIORITIES = ["--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "0"]


def test_a_preempted_request_beyond_the_pool_comes_back():
    prompts = some_prompts(20, 20, 20, 20)
    low = [greedy(prompt, 350, extra={"priority": 1}) for prompt in prompts[:3]]
    high = greedy(prompts[3], 60, at_step=260, extra={"priority": 9})
    flags = [*FLAGS, *pool(230), *PRIORITIES, *SETTING.flags, "--max-running-requests", "3"]
    result = run_scheduler(flags, [*low, high])
    result.assert_clean()
    assert [len(output.output_ids) for output in result.outputs] == [350] * 3 + [60]
    assert sum(map(len, restores_of(result))) == sum(output.retractions for output in result.outputs) == 1
    for i in range(3):
        expected = expected_of(result, i, prompts[i], 350)
        assert_same_tokens(result.outputs[i].output_ids, expected, f"request {i}")


def test_as_many_are_preempted_as_the_newcomer_needs():
    """Admission asks for its prompt and its growth in whole pages, so preempting one of two would be for nothing."""
    prompts = some_prompts(30, 30, 430)
    low = [greedy(prompt, 350, extra={"priority": 1}) for prompt in prompts[:2]]
    high = greedy(prompts[2], 60, at_step=100, extra={"priority": 9})
    flags = [*FLAGS, *pool(512, 16), *PRIORITIES, *SETTING.flags, "--max-running-requests", "2"]
    result = run_scheduler(flags, [*low, high])
    result.assert_clean()
    assert [output.retractions for output in result.outputs] == [1, 1, 0]
    started = [step["batch"] for step in result.probe.steps if rid_of(2) in str(step["batch"])]
    assert started and all(len(batch) == 1 for batch in started)


def test_a_request_aborted_while_it_waits_to_be_restored_leaves_nothing_behind():
    prompts = some_prompts(20, 20)
    # Only one of them may run, so the first waits from step 200 on until the second is done.
    low = greedy(prompts[0], 350, extra={"priority": 1}, abort_at_step=240)
    high = greedy(prompts[1], 120, at_step=200, extra={"priority": 9})
    flags = [*FLAGS, *pool(180), *PRIORITIES, *SETTING.flags, "--max-running-requests", "1"]
    result = run_scheduler(flags, [low, high])
    result.assert_clean()
    assert result.probe.retractions == 1
    assert "Restored" not in result.log
    assert result.outputs[0].finish_reason["type"] == "abort"
    assert "does not fit" not in str(result.outputs[0].finish_reason)
    assert len(result.outputs[1].output_ids) == 120


def test_what_fits_neither_way_is_ended_with_a_clear_error():
    """Right before a compaction a restored request needs room for new queries beyond its capacity."""
    prompts = some_prompts(20, 10)
    ends = set()
    for at_step in (201, 213):
        low = greedy(prompts[0], 350, extra={"priority": 1})
        high = greedy(prompts[1], 20, at_step=at_step, extra={"priority": 9})
        # Room for the prompt and one capacity, as admission counts, and no more.
        num_slots = len(prompts[0]) + SETTING.budget + SETTING.buffer
        flags = [*FLAGS, *pool(num_slots), *PRIORITIES, *SETTING.flags, "--max-running-requests", "1"]
        result = run_scheduler(flags, [low, high])
        result.assert_clean()
        assert len(result.outputs[1].output_ids) == 20
        end = result.outputs[0].finish_reason
        ends.add(end["type"])
        if end["type"] == "abort":
            assert end["status_code"] == 503
            assert f"does not fit the KV pool of {num_slots} tokens" in end["message"]
            assert "--mem-fraction-static" in end["message"]
        else:
            assert len(result.outputs[0].output_ids) == 350
            assert_same_tokens(result.outputs[0].output_ids, expected_of(result, 0, prompts[0], 350), "restored")
    assert ends == {"length", "abort"}


def paused(*while_paused: Control, at_step: int = 188) -> RunResult:
    """Run one request beyond its pool that is stopped by hand at this step, and goes on ten passes later."""
    controls = [
        Control(at_step, "PauseGenerationReqInput", {"mode": "retract"}),
        *while_paused,
        Control(at_step + 10, "ContinueGenerationReqInput", {"torch_empty_cache": False}),
    ]
    result = run_scheduler([*FLAGS, *pool(100), *SETTING.flags], [greedy(*PAUSED)], controls=controls)
    result.assert_clean()
    assert result.probe.retractions == 1
    return result


PAUSED = (some_prompts(20)[0], 300)


def test_a_pause_that_delays_no_compaction_changes_no_token():
    result = paused()
    (restores,) = restores_of(result)
    # Sixteen tokens lie between compactions, and the one after the restore waits for eight queries.
    before = [event["output_len"] for event in result.probe.compactions if event["output_len"] <= restores[0]]
    assert restores[0] - before[-1] < 6
    found = result.outputs[0].output_ids
    undisturbed = dense_generate(MODEL, *PAUSED, budget=SETTING.budget, buffer=SETTING.buffer, guessed_output_ids=found)
    assert_same_tokens(found, undisturbed, "as if never paused")
    expected = expected_of(result, 0, *PAUSED, overlap=False)
    assert expected.output_ids == undisturbed.output_ids


@pytest.mark.parametrize(
    "controls, why",
    [
        ([Control(192, "FlushCacheReqInput")], "the cache was flushed"),
        (
            [Control(192, "UpdateWeightFromDiskReqInput", {"model_path": str(MODEL), "flush_cache": False})],
            "the weights changed",
        ),
        # A trainer may write weights between these two by itself.
        ([Control(192, "BeginWeightUpdateReqInput"), Control(200, "EndWeightUpdateReqInput")], "the weights changed"),
        ([Control(180, "BeginWeightUpdateReqInput"), Control(192, "EndWeightUpdateReqInput")], "the weights changed"),
    ],
    ids=["flush", "weights", "a push begins", "a push ends"],
)
def test_old_kv_does_not_come_back_after_a_flush_or_new_weights(controls, why):
    result = paused(*controls)
    end = result.outputs[0].finish_reason
    assert end["type"] == "abort" and end["status_code"] == 503
    assert why in end["message"] and "does not fit the KV pool of 100 tokens" in end["message"]
    assert "Restored" not in result.log


def test_who_meets_a_full_queue_when_it_is_preempted_is_ended_with_what_it_says_of_its_cache():
    prompts = some_prompts(20, 20, 20)
    requests = [greedy(prompt, 90, at_step=4 * i) for i, prompt in enumerate(prompts)]
    controls = [
        Control(70, "PauseGenerationReqInput", {"mode": "retract"}),
        Control(75, "ContinueGenerationReqInput", {"torch_empty_cache": False}),
    ]
    flags = [*FLAGS, *SETTING.flags, "--max-queued-requests", "1"]
    result = run_scheduler(flags, requests, controls=controls)
    result.assert_clean()
    assert result.probe.retractions == 3
    ended = [output for output in result.outputs if output.finish_reason["type"] == "abort"]
    assert len(ended) == 2
    for output in ended:
        assert output.finish_reason["status_code"] == 503
        assert output.finish_reason["message"] == "The request queue is full."
        assert output.info["kv_policy"] == "rkv" and output.info["kv_compactions"] >= 1
    (whole,) = [i for i in range(3) if result.outputs[i] not in ended]
    assert_same_tokens(result.outputs[whole].output_ids, expected_of(result, whole, prompts[whole], 90), "the other")


def test_two_ranks_restore_the_same_requests():
    prompts = some_prompts(30, 20, 12)
    num_slots, interval = POOLS[1]
    flags = [*FLAGS, *pool(num_slots), *SETTING.flags, "--tp", "2"]
    env = {**retracting(interval), "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    result = run_scheduler(flags, [greedy(prompt, 230) for prompt in prompts], env=env, timeout=400)
    result.assert_clean()
    assert sum(map(len, restores_of(result))) >= 1
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        assert_same_tokens(output.output_ids, expected_of(result, i, prompt, 230), f"request {i}")
