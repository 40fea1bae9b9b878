"""What a request carries besides its KV comes back with it: after a retraction it goes on as if undisturbed."""

import random
from dataclasses import replace
from typing import Any

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, outputs_at_restores, outputs_at_retractions, random_ids
from tests.support.harness.gate import Control
from tests.support.harness.scheduler import Output, Request, rid_of, run_scheduler

MODEL = tiny_model_path("qwen3")
SETTING = Setting(budget=12, buffer=12)
PROMPT_LEN, NUM_TOKENS = 8, 190
# Outputs after which a request is paused, and comes back with what it kept: right after its compaction at 144, so that
# the next one is not delayed by the queries it needs.
PAUSED_AT = 147
# The same of one without a policy, which is computed again, whole.
WHOLE_PAUSED_AT, WHOLE_TOKENS = 41, 60
# Eight tokens take turns, so that every one that is counted too often or too rarely shows at once.
FEW = {str(token): 90.0 for token in range(50, 58)}
STATES: list[dict[str, Any]] = [
    {"frequency_penalty": 1.5, "logit_bias": FEW},
    {"presence_penalty": 1.0, "repetition_penalty": 1.3},
    {"regex": r"([a-f]{3}=[0-9]{2};){90}", "ignore_eos": False},
    {"min_new_tokens": 170, "stop_token_ids": list(range(3, 250)), "ignore_eos": False},
]
WHOLE = {"frequency_penalty": 1.5, "logit_bias": FEW, "repetition_penalty": 1.1, "custom_params": {"kv_policy": "none"}}


def asking(prompt: list[int], state: dict[str, Any], num_tokens: int = NUM_TOKENS, **fields: Any) -> Request:
    return Request(
        input_ids=prompt, sampling_params={"max_new_tokens": num_tokens, "ignore_eos": True, **state}, **fields
    )


def paused_when(index: int, num_outputs: int) -> list[Control]:
    return [
        Control(0, "PauseGenerationReqInput", {"mode": "retract"}, after_tokens=(rid_of(index), num_outputs)),
        Control(0, "ContinueGenerationReqInput", {"torch_empty_cache": False}, wait=3),
    ]


def waves(rng: random.Random) -> tuple[list[list[Request]], list[Control]]:
    """Return requests that run one wave after the other, and pauses in the third and the fifth of them.

    The first wave's first request sees others arrive; the second is undisturbed, the third the same and paused; so are
    the fourth and the fifth, of a request that keeps all its tokens.
    """
    prompts = [random_ids(rng, PROMPT_LEN) for _ in STATES]
    crowded = [asking(prompts[0], STATES[0], 70)]
    crowded += [asking(random_ids(rng, PROMPT_LEN), STATES[1], 9, at_step=step) for step in (20, 24, 25, 26)]
    undisturbed = [asking(prompt, state) for prompt, state in zip(prompts, STATES, strict=True)]
    whole = [asking(random_ids(rng, PROMPT_LEN), WHOLE, WHOLE_TOKENS)]
    all_waves = [crowded, undisturbed, undisturbed, whole, whole]
    # Nothing of one wave is found in the tree by another.
    all_waves = [
        [replace(r, when_idle=number > 0 and i == 0, extra={"extra_key": str(number)}) for i, r in enumerate(wave)]
        for number, wave in enumerate(all_waves)
    ]
    first = [sum(map(len, all_waves[:number])) for number in range(len(all_waves))]
    return all_waves, [*paused_when(first[2], PAUSED_AT - 1), *paused_when(first[4], WHOLE_PAUSED_AT - 1)]


@pytest.fixture(scope="module", params=[[], ["--disable-overlap-schedule"]], ids=["overlap", "no-overlap"])
def outputs(request: pytest.FixtureRequest) -> list[list[Output]]:
    """Return the outputs of each wave, those of the paused ones seen to have come back as they were meant to."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed of the requests: {seed}")
    all_waves, controls = waves(random.Random(seed))
    pool = len(STATES) * (PROMPT_LEN + SETTING.budget + SETTING.buffer)
    flags = ["--model-path", str(MODEL), "--max-total-tokens", str(pool), *SETTING.flags, *request.param]
    result = run_scheduler(flags, [r for wave in all_waves for r in wave], controls=controls, with_tokenizer=True)
    result.assert_clean()
    rids = iter(map(rid_of, range(len(result.outputs))))
    restores = [[outputs_at_restores(result, next(rids)) for _ in wave] for wave in all_waves]
    assert [len(at) for wave in restores for at in wave] == [0] * 9 + [1] * 4 + [0] * 2
    assert all(abs(at - PAUSED_AT) <= 1 for (at,) in restores[2])
    (recomputed,) = outputs_at_retractions(result, rid_of(len(result.outputs) - 1))
    assert abs(recomputed - WHOLE_PAUSED_AT) <= 1
    outputs = iter(result.outputs)
    return [[next(outputs) for _ in wave] for wave in all_waves]


@pytest.mark.parametrize("index", range(len(STATES)), ids=[" ".join(state) for state in STATES])
def test_a_restored_request_goes_on_with_all_its_state(outputs, index):
    undisturbed, restored = outputs[1][index], outputs[2][index]
    assert restored.output_ids == undisturbed.output_ids
    assert restored.finish_reason == undisturbed.finish_reason
    assert (undisturbed.retractions, restored.retractions) == (0, 1)


def test_what_stops_late_stopped_because_it_might(outputs):
    undisturbed = outputs[1][-1]
    assert undisturbed.finish_reason["type"] == "stop"
    assert STATES[-1]["min_new_tokens"] < len(undisturbed.output_ids) < NUM_TOKENS


def test_a_request_that_is_computed_again_keeps_its_penalties(outputs):
    ((undisturbed,), (recomputed,)) = outputs[3:]
    assert recomputed.output_ids == undisturbed.output_ids


def test_an_answer_that_was_discarded_counts_no_more(rng):
    """SGLang begins anew where the prompt came as embeddings; what it sent before stays in front of the answer."""
    embeds = [[rng.gauss(0, 1) for _ in range(128)] for _ in range(PROMPT_LEN)]
    request = asking([1] * PROMPT_LEN, {}, 100, extra={"input_embeds": embeds})
    # With --dtype float32 such a request ends any server of SGLang 0.5.23.
    flags = ["--model-path", str(MODEL), "--dtype", "bfloat16", *SETTING.flags]
    result = run_scheduler(flags, [request], controls=paused_when(0, 70))
    result.assert_clean()
    (output,) = result.outputs
    assert (output.retractions, len(output.output_ids)) == (1, 100)
    generated = len(output.output_ids) - 1
    compactions = len(range(SETTING.budget + SETTING.buffer, generated, SETTING.buffer))
    assert output.info == {
        "kv_policy": "rkv",
        "kv_compactions": compactions,
        "kv_resident_tokens": PROMPT_LEN + generated - SETTING.buffer * compactions,
        "kv_evicted_tokens": SETTING.buffer * compactions,
        "kv_prompt_tokens": PROMPT_LEN,
    }


def test_penalties_do_not_depend_on_who_arrives(outputs):
    crowded = outputs[0][0].output_ids
    assert crowded == outputs[1][0].output_ids[: len(crowded)]
