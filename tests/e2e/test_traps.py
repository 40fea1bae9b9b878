"""Places where compaction once went wrong, or would without a mend that no other test would miss."""

import random

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import (
    Setting,
    assert_same_tokens,
    greedy,
    oracle,
    outputs_at_retractions,
    random_ids,
    retracting,
    six_prompts,
)
from tests.support.harness.scheduler import Request, run_scheduler
from tests.support.oracle.dense import dense_generate

MODEL = tiny_model_path("llama-gqa")
FLAGS = ["--model-path", str(MODEL)]
SETTING = Setting(budget=24, buffer=16)
CAPACITY = SETTING.budget + SETTING.buffer


@pytest.mark.parametrize("overlap", [[], ["--disable-overlap-schedule"]], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_identical_prompts_under_forced_retraction_never_write_shared_slots(page_size, overlap):
    """A retracted request must not take a finished twin's answer out of the tree and then compact it."""
    prompt = six_prompts()[0]
    # Twins that end early leave their whole answers in the tree for those that go on.
    lengths = [CAPACITY - 3, CAPACITY - 3, CAPACITY, 150, 150, 150]
    requests = [greedy(prompt, length) for length in lengths]
    flags = [*FLAGS, "--page-size", str(page_size), *overlap, *SETTING.flags]
    result = run_scheduler(flags, requests, env=retracting(17))
    result.assert_clean()
    assert result.probe.retractions >= 3
    assert all(
        entry["protected_len"] <= len(prompt) for i in (3, 4, 5) for entry in result.probe.per_request(f"r{i:05d}")
    )
    for i, (length, output) in enumerate(zip(lengths, result.outputs, strict=True)):
        assert len(output.output_ids) == length
        expected = dense_generate(
            MODEL,
            prompt,
            length,
            budget=SETTING.budget,
            buffer=SETTING.buffer,
            recompute_at=outputs_at_retractions(result, f"r{i:05d}"),
            guessed_output_ids=output.output_ids,
        )
        assert_same_tokens(output.output_ids, expected, f"request {i}")


@pytest.mark.parametrize("seed", [3, 4])
def test_a_retracted_request_goes_on_as_the_oracle_that_recomputes_at_the_same_token(seed):
    prompts = six_prompts(seed)
    requests = [greedy(prompt, 160 + 7 * i) for i, prompt in enumerate(prompts)]
    result = run_scheduler([*FLAGS, "--page-size", "16", *SETTING.flags], requests, env=retracting(23))
    result.assert_clean()
    assert result.probe.retractions >= 4
    assert any(entry["compactions"] for entry in result.probe.per_request("r00005"))
    for i, prompt in enumerate(prompts):
        points = outputs_at_retractions(result, f"r{i:05d}")
        assert len(points) == result.outputs[i].retractions
        found = result.outputs[i].output_ids
        expected = dense_generate(
            MODEL,
            prompt,
            160 + 7 * i,
            budget=SETTING.budget,
            buffer=SETTING.buffer,
            recompute_at=points,
            guessed_output_ids=found,
        )
        assert_same_tokens(found, expected, f"request {i}, recomputed at {points}")


def test_a_request_whose_last_token_is_in_flight_is_not_compacted():
    """Else its answer stays out of the tree, though it never needed a compaction."""
    prompt = six_prompts()[0]
    # All that a compaction waits for is there after the last decode step, when no other follows.
    first = greedy(prompt, CAPACITY + 1)
    answer = oracle(MODEL, prompt, CAPACITY + 1, SETTING).output_ids

    def cached_tokens(flags: list[str]) -> int:
        follow_up = Request(
            input_ids=[*prompt, *answer, 7, 8, 9],
            sampling_params={"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
            when_idle=True,
        )
        result = run_scheduler([*FLAGS, *flags], [first, follow_up])
        result.assert_clean()
        assert result.outputs[0].output_ids == answer
        return result.outputs[1].cached_tokens

    vanilla = cached_tokens([])
    assert vanilla == len(prompt) + CAPACITY
    assert cached_tokens(SETTING.flags) == vanilla
    assert cached_tokens([*SETTING.flags, "--disable-overlap-schedule"]) == vanilla


def test_a_buffer_smaller_than_the_window_keeps_its_queries_from_one_compaction_to_the_next():
    setting = Setting(budget=20, buffer=3, window=8)
    prompts = six_prompts()
    result = run_scheduler([*FLAGS, *setting.flags], [greedy(prompt, 80) for prompt in prompts])
    result.assert_clean()
    for prompt, output in zip(prompts, result.outputs, strict=True):
        expected = oracle(MODEL, prompt, 80, setting, output.output_ids)
        assert len(expected.compactions) >= 18
        assert_same_tokens(output.output_ids, expected, "small buffer")


def test_prefix_stays_bitwise_through_a_hundred_compactions_and_is_found_again():
    prompt = six_prompts()[3]
    requests = [greedy((*prompt, 5 + i, 9), 190) for i in range(12)]
    probe_request = greedy((*prompt, 200, 201, 202), 4, when_idle=True)
    result = run_scheduler([*FLAGS, *SETTING.flags], [greedy(prompt, 2), *requests, probe_request])
    # The probe compares every tree-owned slot with its copy at every step.
    result.assert_clean()
    assert len(result.probe.compactions) >= 100
    assert result.outputs[-1].cached_tokens == len(prompt)


def test_an_answer_that_was_compacted_is_not_found_by_one_that_goes_on_from_it():
    prompt = six_prompts()[3]
    expected = oracle(MODEL, prompt, 150, SETTING)
    longer = (*prompt, *expected.output_ids[: CAPACITY + 5], 7)
    result = run_scheduler(
        [*FLAGS, *SETTING.flags], [greedy(prompt, 150), greedy(longer, 8, when_idle=True), greedy(prompt, 8)]
    )
    result.assert_clean()
    assert_same_tokens(result.outputs[0].output_ids, expected, "the first turn")
    # Its slots hold other positions than the tokens in their order would have.
    assert result.outputs[1].cached_tokens <= len(prompt)
    assert_same_tokens(result.outputs[1].output_ids, oracle(MODEL, longer, 8, SETTING), "the second turn")


def test_resident_kv_stays_bounded_through_two_thousand_tokens():
    prompt = six_prompts()[1]
    bound = len(prompt) + CAPACITY
    for page_size, num_tokens in ((1, 2000), (16, 600)):
        flags = [*FLAGS, "--page-size", str(page_size), *SETTING.flags]
        result = run_scheduler(flags, [greedy(prompt, num_tokens)], env={"RKV_PROBE_MAX_PRIVATE": str(CAPACITY)})
        result.assert_clean()
        assert len(result.outputs[0].output_ids) == num_tokens
        held = [step["total"] - step["available"] - step["evictable"] for step in result.probe.steps]
        assert len(held) >= num_tokens
        # Whole pages: the one that prompt and answer share, and the last.
        assert max(held) <= -(-bound // page_size) * page_size
        assert max(entry["allocated_len"] for entry in result.probe.per_request("r00000")) == bound


@pytest.mark.parametrize("overlap", [[], ["--disable-overlap-schedule"]], ids=["overlap", "no-overlap"])
def test_aborts_at_every_moment_of_a_compaction_lose_nothing(overlap):
    prompts = six_prompts()
    requests = [greedy(prompts[i % 6], 120, abort_at_step=CAPACITY - 4 + i) for i in range(12)]
    requests.append(greedy(random_ids(random.Random(1), 9), 130))
    flags = [*FLAGS, "--page-size", "16", "--max-running-requests", "16", *overlap, *SETTING.flags]
    result = run_scheduler(flags, requests)
    result.assert_clean()
    assert {output.finish_reason["type"] for output in result.outputs[:12]} == {"abort"}
    found = result.outputs[-1].output_ids
    assert_same_tokens(found, oracle(MODEL, tuple(requests[-1].input_ids), 130, SETTING, found), "the one left")


def test_where_thinking_is_stripped_from_the_cache_prompts_alone_stay_in_it():
    """SGLang frees all behind the prompt's own length then, which a compacted prompt does not have any more."""
    kinds = [(3, 90, 0), (1, 20, 0), (5, 90, 20)]
    prompts = [six_prompts()[i] for i, _, _ in kinds]
    requests, follow_ups = [], []
    for prompt, (_, num_tokens, prompt_budget) in zip(prompts, kinds, strict=True):
        requests.append(greedy(prompt, num_tokens, extra={"require_reasoning": True}))
        requests[-1].sampling_params["custom_params"] = {"kv_prompt_budget": prompt_budget}
        answer = oracle(MODEL, prompt, 20, SETTING).output_ids
        follow_ups.append(greedy((*prompt, *answer, 7), 2, when_idle=True))
    flags = ["--page-size", "16", "--strip-thinking-cache", "--reasoning-parser", "qwen3", *SETTING.flags]
    result = run_scheduler([*FLAGS, *flags], [*requests, *follow_ups], with_tokenizer=True)
    result.assert_clean()
    for prompt, (_, num_tokens, prompt_budget), output in zip(prompts, kinds, result.outputs, strict=False):
        setting = Setting(SETTING.budget, SETTING.buffer, prompt_budget=prompt_budget)
        expected = oracle(MODEL, prompt, num_tokens, setting, output.output_ids)
        assert_same_tokens(output.output_ids, expected, f"stripped, prompt budget {prompt_budget}")
        assert output.info["kv_compactions"] == len(expected.compactions)
    # Whole pages of the prompts and nothing behind them; the tree had kept those of the compacted one.
    assert [output.cached_tokens for output in result.outputs[3:]] == [len(prompt) // 16 * 16 for prompt in prompts]
