"""With --kv-stagger every request's first compaction comes at a place of its own, and answers stay the oracle's."""

from collections import Counter

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
from tests.support.harness.scheduler import Request, rid_of, run_scheduler
from tests.support.oracle.dense import DenseResult, dense_generate

MODEL = tiny_model_path("llama-gqa")
FLAGS = ["--model-path", str(MODEL)]
SETTING = Setting(budget=37, buffer=23, stagger=True)
NUM_TOKENS = 180


def asking(prompt: tuple[int, ...], setting: Setting, num_tokens: int) -> Request:
    request = greedy(prompt, num_tokens)
    request.sampling_params["custom_params"] = {"kv_budget": setting.budget, "kv_buffer": setting.buffer}
    return request


@pytest.mark.parametrize(
    ("page_size", "extra"),
    [(1, []), (16, ["--disable-overlap-schedule", "--disable-radix-cache"]), (64, ["--chunked-prefill-size", "64"])],
    ids=["1", "16-no-overlap-no-radix", "64-chunks"],
)
def test_tokens_equal_the_dense_oracle(page_size, extra):
    prompts = six_prompts()
    requests = [greedy(prompt, NUM_TOKENS, when_idle=i == 1) for i, prompt in enumerate([prompts[2], *prompts])]
    flags = [*FLAGS, "--page-size", str(page_size), *extra, *SETTING.flags]
    result = run_scheduler(flags, requests, env={"RKV_PROBE_MAX_PRIVATE": str(SETTING.budget + SETTING.buffer)})
    result.assert_clean()
    first = set()
    for i, prompt in enumerate([prompts[2], *prompts]):
        found = result.outputs[i].output_ids
        expected = oracle(MODEL, prompt, NUM_TOKENS, SETTING, found)
        first.add(expected.compactions[0].num_outputs)
        assert_same_tokens(found, expected, f"request {i}")
    assert len(first) > 3


# The budget is below the outputs that decide, the window above the buffer, or both; or as large as can be.
ASKED = [Setting(17, 5), Setting(9, 3), Setting(9, 30), Setting(12, 7), Setting(64, 40), Setting(32, 1)]


@pytest.mark.parametrize("extra", [[], ["--disable-overlap-schedule"]], ids=["overlap", "no-overlap"])
def test_settings_of_requests_decide_with_their_tokens(extra):
    prompts = six_prompts()
    # The last but one may not outgrow its capacity, and the others may.
    lengths = [150, 150, 150, 150, 104, 150]
    batch = [asking(*asked) for asked in zip(prompts, ASKED, lengths, strict=True)]
    result = run_scheduler([*FLAGS, *extra, *SETTING.flags], batch)
    result.assert_clean()
    for i, (prompt, asked, length) in enumerate(zip(prompts, ASKED, lengths, strict=True)):
        setting = Setting(asked.budget, asked.buffer, stagger=True)
        found = result.outputs[i].output_ids
        expected = oracle(MODEL, prompt, length, setting, found)
        assert bool(expected.compactions) == (i != 4)
        assert_same_tokens(found, expected, f"request {i}, {setting}")


def test_a_request_that_is_computed_again_has_the_same_head_start():
    prompts, interval = six_prompts(), 45
    requests = [greedy(prompt, NUM_TOKENS) for prompt in prompts]
    result = run_scheduler([*FLAGS, *SETTING.flags], requests, env=retracting(interval))
    result.assert_clean()
    assert result.probe.retractions > 0
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        expected = dense_generate(
            MODEL,
            prompt,
            NUM_TOKENS,
            budget=SETTING.budget,
            buffer=SETTING.buffer,
            early=SETTING.early,
            recompute_at=outputs_at_retractions(result, rid_of(i)),
            guessed_output_ids=output.output_ids,
        )
        assert_same_tokens(output.output_ids, expected, f"request {i}")


def in_a_full_pool(prompts: list[tuple[int, ...]], setting: Setting, num_tokens: int) -> list[DenseResult]:
    """Serve requests that reserve the whole pool together, none of which must be retracted; return right answers."""
    num_slots = sum(len(prompt) + setting.budget + setting.buffer for prompt in prompts)
    flags = [*FLAGS, "--max-total-tokens", str(num_slots), *setting.flags]
    result = run_scheduler(flags, [greedy(prompt, num_tokens) for prompt in prompts])
    result.assert_clean()
    assert result.probe.retractions == 0
    found = [output.output_ids for output in result.outputs]
    answers = [oracle(MODEL, prompt, num_tokens, setting, ids) for prompt, ids in zip(prompts, found, strict=True)]
    for i, (ids, expected) in enumerate(zip(found, answers, strict=True)):
        assert_same_tokens(ids, expected, f"request {i}")
    return answers


def test_a_crowd_is_compacted_few_at_a_time(rng):
    setting = Setting(budget=40, buffer=32, stagger=True)
    answers = in_a_full_pool([tuple(random_ids(rng, 8)) for _ in range(24)], setting, 140)
    due = Counter(compaction.num_outputs for expected in answers for compaction in expected.compactions)
    # By chance more than nine come together once in a million crowds.
    assert max(due.values()) < 10 and due.total() >= 48


def test_equal_requests_need_a_query_row_at_once_long_before_they_hold_what_there_is_a_row_for():
    setting = Setting(budget=20, buffer=60, stagger=True)
    # Its head start is 31.
    prompt = six_prompts(6)[4]
    (first, *_), *_ = [answer.compactions for answer in in_a_full_pool([prompt] * 24, setting, 100)]
    assert first.num_outputs < 70
