"""A request's long prompt is compacted into slots of its own, and the radix tree's are never written."""

from typing import Any

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import (
    Setting,
    assert_same_tokens,
    greedy,
    oracle,
    outputs_at_restores,
    outputs_at_retractions,
    random_ids,
    retracting,
    six_prompts,
)
from tests.support.harness.gate import Control
from tests.support.harness.scheduler import Request, RunResult, rid_of, run_scheduler
from tests.support.oracle.dense import DenseResult, dense_generate

MODEL = tiny_model_path("llama-gqa")
FLAGS = ["--model-path", str(MODEL)]
VERIFYING = {"RKV_SGLANG_VERIFY": "1"}
NUM_TOKENS = 60
# What some requests ask for themselves, and what is kept of their prompts then.
ASKED: list[tuple[dict[str, Any], int]] = [
    ({"kv_prompt_budget": 0}, 0),
    ({"kv_prompt_budget": 60}, 60),
    ({"kv_policy": "none"}, 0),
]


def setting_of(policy: str, prompt_budget: int = 40, block: int | None = None) -> Setting:
    return Setting(budget=24, buffer=16, policy=policy, prompt_budget=prompt_budget, block=block)


def asking(custom: dict[str, Any], prompt: tuple[int, ...], num_tokens: int, **fields: Any) -> Request:
    request = greedy(prompt, num_tokens, **fields)
    request.sampling_params["custom_params"] = custom
    return request


@pytest.mark.parametrize(
    "policy, block, page_size, extra, env",
    [
        ("rkv", None, 16, ["--chunked-prefill-size", "32"], VERIFYING),
        ("snapkv", None, 1, [], {}),
        ("streaming_llm", None, 16, ["--disable-overlap-schedule"], {}),
        ("random_attention", None, 1, ["--disable-radix-cache"], VERIFYING),
        ("rkv", 16, 1, [], VERIFYING),
        ("random_attention", 16, 16, ["--chunked-prefill-size", "32"], VERIFYING),
        ("snapkv", 16, 16, ["--disable-overlap-schedule"], VERIFYING),
        ("streaming_llm", 16, 1, ["--chunked-prefill-size", "32"], {}),
    ],
)
def test_requests_that_share_a_prefix_answer_as_the_oracle_says(policy, block, page_size, extra, env):
    setting, prompts = setting_of(policy, block=block), six_prompts()
    # Some find the prefix in the cache, some come while others decode, and some come back to a prompt that was cached,
    # whatever its owner kept of it.
    requests = [greedy(prompt, NUM_TOKENS, at_step=7 * i) for i, prompt in enumerate(prompts)]
    requests += [asking(custom, prompts[3], NUM_TOKENS, at_step=50) for custom, _ in ASKED]
    requests.append(greedy(prompts[3], NUM_TOKENS, when_idle=True))
    flags = [*FLAGS, "--page-size", str(page_size), *setting.flags, *extra]
    result = run_scheduler(flags, requests, env=env)
    result.assert_clean()
    budgets = [*[40] * 6, *[budget for _, budget in ASKED], 40]
    for i, (request, budget, output) in enumerate(zip(requests, budgets, result.outputs, strict=True)):
        prompt, has_policy = tuple(request.input_ids), i != 8
        own = setting_of(policy, budget, block) if has_policy else Setting(budget=1000, buffer=1)
        expected = oracle(MODEL, prompt, NUM_TOKENS, own, output.output_ids)
        num_dropped = (len(prompt) - budget) // (block or 1) * (block or 1) if 0 < budget < len(prompt) else 0
        is_compacted = num_dropped > 0
        assert len(expected.compactions) == (2 + is_compacted) * has_policy
        assert_same_tokens(output.output_ids, expected, f"request {i}")
        assert output.info["kv_prompt_tokens"] == len(prompt) - num_dropped
    if "--disable-radix-cache" not in extra:
        # Whole pages of the whole prompt.
        assert all(output.cached_tokens >= len(prompts[3]) - page_size for output in result.outputs[6:])


# Small enough that histories soon outgrow the pool.
SMALL = Setting(budget=10, buffer=6, window=4, prompt_budget=12)
PROMPT_LEN = 24
# What is taken for one at most: its prompt, which may stay in the cache, and all that it comes to hold besides.
PEAK = PROMPT_LEN + SMALL.prompt_budget + SMALL.budget + SMALL.buffer


IN_BLOCKS = Setting(budget=20, buffer=16, window=4, policy="random_attention", block=16, prompt_budget=36)


def expected_of(
    result: RunResult,
    index: int,
    request: Request,
    *,
    setting: Setting = SMALL,
    overlap: bool = True,
    pool: int = 10**6,
) -> DenseResult:
    """Return what the oracle answers that is retracted, recomputed and restored at the same tokens.

    Where the pool would not hold a long history and what stays of its prompt beside it, that stays whole: this is
    asserted wherever there was time to compact it.
    """
    rid = rid_of(index)
    recomputed = outputs_at_retractions(result, rid)
    own = [event for event in result.probe.compactions if event["rid"] == rid and event["of_prompt"]]
    compacted = [event["output_len"] for event in own]
    found = result.outputs[index].output_ids
    # A restored one has had its prompt compacted, or never will have.
    prefills = sorted({0, *recomputed})
    spans = list(zip(prefills, [*prefills[1:], len(found)], strict=True))
    whole = {start for start, end in spans if not any(start < at <= end for at in compacted)}
    for start, end in spans:
        needed = len(request.input_ids) + start + setting.prompt_budget + setting.budget + setting.buffer
        assert start not in whole or end - start <= setting.window + 3 or needed >= pool - 16, (rid, start, end)
    return dense_generate(
        MODEL,
        request.input_ids,
        request.sampling_params["max_new_tokens"],
        budget=setting.budget,
        buffer=setting.buffer,
        window=setting.window,
        score=setting.score,
        block=setting.block,
        prompt_budget=setting.prompt_budget,
        recompute_at=recomputed,
        restore_at=outputs_at_restores(result, rid),
        guessed_output_ids=found,
        restored_in_flight=overlap,
        whole_prompt_after=whole,
    )


@pytest.mark.parametrize(
    "setting, prompt_len, kept, pool, interval, page_size, extra",
    [
        (SMALL, PROMPT_LEN, SMALL.prompt_budget, 88, 72, 1, []),
        (SMALL, PROMPT_LEN, SMALL.prompt_budget, 88, 72, 4, ["--disable-overlap-schedule", "--disable-radix-cache"]),
        # Of 72 tokens two blocks go.
        (IN_BLOCKS, 72, 40, 224, 180, 4, []),
    ],
)
def test_a_request_beyond_its_pool_comes_back_with_what_it_kept_of_its_prompt(
    setting, prompt_len, kept, pool, interval, page_size, extra, rng
):
    shared = random_ids(rng, 9)
    requests = [
        greedy([*shared, *random_ids(rng, prompt_len - 9)], 2 * interval, return_logprob=True, logprob_start_len=start)
        for start in (0, -1)
    ]
    # Two just run, and after so many steps either has seen more than the pool holds.
    flags = [*FLAGS, "--max-total-tokens", str(pool), "--page-size", str(page_size), *extra, *setting.flags]
    result = run_scheduler(flags, requests, env={**retracting(interval), **VERIFYING})
    result.assert_clean()
    assert "KV cache pool is full" not in result.log
    assert sum(len(outputs_at_restores(result, rid_of(i))) for i in range(2)) >= 1
    for i, (request, output) in enumerate(zip(requests, result.outputs, strict=True)):
        expected = expected_of(result, i, request, setting=setting, overlap=not extra, pool=pool)
        expected = assert_same_tokens(output.output_ids, expected, f"request {i}")
        assert output.output_logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        assert len(output.input_logprobs) == (prompt_len if i == 0 else 0)
        assert output.info["kv_prompt_tokens"] == kept


def test_requests_that_are_paused_or_end_around_the_compaction_of_their_prompt_leave_nothing_behind(rng):
    prompts = [random_ids(rng, PROMPT_LEN) for _ in range(2)]
    # All but the first end just before it, at it, and at each of the tokens that follow.
    requests = [greedy(prompts[0], 60)]
    requests += [greedy([*prompts[0][:17], *prompts[1][i:]], 60, abort_after_tokens=2 + i) for i in range(6)]
    # Generates what its compaction would wait for, and no more.
    requests.append(greedy(prompts[1], SMALL.window + 1))
    controls = []
    for at_step, mode in ((3, "retract"), (14, "in_place"), (30, "retract"), (36, "retract")):
        controls.append(Control(at_step, "PauseGenerationReqInput", {"mode": mode}))
        controls.append(Control(at_step + 3, "ContinueGenerationReqInput", {"torch_empty_cache": False}))
    flags = [*FLAGS, "--page-size", "4", *SMALL.flags]
    result = run_scheduler(flags, requests, controls=controls, env=VERIFYING)
    result.assert_clean()
    assert len(outputs_at_retractions(result, rid_of(0))) == 3
    assert_same_tokens(result.outputs[0].output_ids, expected_of(result, 0, requests[0]), "paused")
    assert result.outputs[7].info["kv_prompt_tokens"] == PROMPT_LEN
    ends = [output.finish_reason["type"] for output in result.outputs]
    assert ends == ["length", *["abort"] * 6, "length"]


@pytest.mark.parametrize("pool, at_first", [(2 * PEAK, 2), (2 * PEAK - 1, 1)])
def test_admission_reserves_the_prompt_and_what_stays_of_it_and_nobody_is_preempted(pool, at_first, rng):
    # The second time, all of it is found in the tree.
    prompts = [random_ids(rng, PROMPT_LEN) for _ in range(3)] * 2
    result = run_scheduler(
        [*FLAGS, "--max-total-tokens", str(pool), *SMALL.flags], [greedy(prompt, 40) for prompt in prompts]
    )
    result.assert_clean()
    assert result.probe.retractions == 0
    assert len(result.probe.steps[0]["batch"]) == at_first
    for prompt, output in zip(prompts, result.outputs, strict=True):
        assert_same_tokens(
            output.output_ids, oracle(MODEL, tuple(prompt), 40, SMALL, output.output_ids), "in a tight pool"
        )


def test_short_answers_to_long_prompts_never_run_out_of_query_rows(rng):
    """Each needs a row for its prompt alone, and there is one for every so many tokens of a long answer."""
    prompt, setting = tuple(random_ids(rng, 30)), Setting(budget=100, buffer=20, prompt_budget=13)
    # Two rows; what a third request will really hold would still fit.
    flags = [*FLAGS, "--max-total-tokens", "300", *setting.flags]
    result = run_scheduler(flags, [greedy(prompt, 15) for _ in range(12)])
    result.assert_clean()
    for output in result.outputs:
        assert_same_tokens(output.output_ids, oracle(MODEL, prompt, 15, setting), "short answer")
        assert output.info["kv_prompt_tokens"] == 13
