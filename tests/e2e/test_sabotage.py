"""What fails in the middle of a compaction, a copy or a restore ends loudly whom it concerns; no token is wrong."""

from dataclasses import replace

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, oracle, six_prompts
from tests.support.harness.gate import Control
from tests.support.harness.scheduler import Output, RunResult, SchedulerFailed, rid_of, run_scheduler

MODEL = tiny_model_path("llama-gqa")
SETTING = Setting(budget=24, buffer=16)
BY_PLACE, BY_SCORES = (replace(SETTING, policy=policy, block=16) for policy in ("random_attention", "keydiff"))
# Of 5, 47 and 74 tokens.
PROMPTS = (*six_prompts()[4:], six_prompts()[0])
NUM_TOKENS = 200


def run(
    pool: int, num_requests: int, sabotage: str, *controls: Control, setting: Setting = SETTING, **env: str
) -> RunResult:
    requests = [greedy(prompt, NUM_TOKENS) for prompt in PROMPTS[:num_requests]]
    requests.append(greedy(PROMPTS[0], NUM_TOKENS, when_idle=True))
    flags = ["--model-path", str(MODEL), "--max-total-tokens", str(pool), *setting.flags]
    return run_scheduler(flags, requests, controls=controls, env={"RKV_SABOTAGE": sabotage, **env})


def paused_after(num_tokens: int) -> list[Control]:
    return [
        Control(0, "PauseGenerationReqInput", {"mode": "retract"}, after_tokens=(rid_of(0), num_tokens)),
        Control(0, "ContinueGenerationReqInput", {"torch_empty_cache": False}, wait=2),
    ]


def assert_right_so_far(output: Output, prompt: tuple[int, ...], at_least: int, setting: Setting = SETTING) -> None:
    assert len(output.output_ids) >= at_least
    right = oracle(MODEL, prompt, NUM_TOKENS, setting, output.output_ids).output_ids[: len(output.output_ids)]
    assert output.output_ids == right


@pytest.mark.parametrize(
    ("kind", "setting"),
    [("choose", SETTING), ("move", SETTING), ("choose", BY_SCORES), ("move", BY_PLACE)],
    ids=["choose", "move", "choose-blocks", "drop-blocks"],
)
def test_a_compaction_that_fails_ends_the_worker_before_a_wrong_token_is_sent(kind, setting):
    with pytest.raises(SchedulerFailed, match="sabotaged on purpose") as caught:
        run(1024, 3, f"{kind}@5", setting=setting)
    assert caught.value.exit_code
    for output, prompt in zip(caught.value.outputs[:3], PROMPTS, strict=True):
        assert output.finish_reason is None
        # SGLang sends what it has after every 50 tokens; the fifth compaction comes after more than a hundred.
        assert_right_so_far(output, prompt, 50, setting)


# What a server that verifies says of each, and the compaction that is spoilt.
SPOILT = [
    (SETTING, 5, r"compaction of 40 generated tokens to 24 after a prompt of \d+: the values moved are not those kept"),
    (BY_PLACE, 5, r"compaction of 40 .* after a prompt of \d+, in blocks of 16: the row is not what stays of it"),
    (
        replace(SETTING, prompt_budget=40),
        1,
        r"compaction of a prompt of \d+ tokens to 40: the values copied are not those kept",
    ),
    (replace(BY_PLACE, prompt_budget=40), 1, "what stays of a prompt was not copied as it was"),
]


@pytest.mark.parametrize(("setting", "first", "line"), SPOILT, ids=["gather", "drop", "prompt", "prompt-blocks"])
def test_a_server_that_verifies_ends_at_a_difference_that_changes_no_token(setting, first, line):
    with pytest.raises(SchedulerFailed, match=f"CompactionDiffersError: {line}; please report this") as caught:
        run(1024, 3, f"spoil@{first}", setting=setting, RKV_SGLANG_VERIFY="1")
    assert caught.value.exit_code
    for output, prompt in zip(caught.value.outputs[:3], PROMPTS, strict=True):
        assert output.finish_reason is None
        if first == 1:
            # Prompts are compacted before anything is sent.
            assert output.output_ids == []
        else:
            assert_right_so_far(output, prompt, 50, setting)


def test_a_copy_for_which_there_is_no_memory_ends_its_request_alone():
    # Two requests just run, and are longer than the pool when they are paused.
    pool = sum(map(len, PROMPTS[:2])) + 2 * (SETTING.budget + SETTING.buffer)
    # The first has no room on the device, the second, whose copy would be the third and fourth tensor, on the host.
    result = run(pool, 2, "save@1,keep@3", *paused_after(pool))
    result.assert_clean()
    assert result.log.count("No memory is left for a copy of the") == 2
    for output, prompt in zip(result.outputs[:2], PROMPTS, strict=False):
        end = output.finish_reason
        assert (end["type"], end["status_code"]) == ("abort", 503)
        assert "no copy of its compressed KV could be kept" in end["message"]
        assert_right_so_far(output, prompt, pool)
    found = result.outputs[2].output_ids
    expected = oracle(MODEL, PROMPTS[0], NUM_TOKENS, SETTING, found)
    assert_same_tokens(found, expected, "served afterwards")


def test_a_restore_that_finds_no_slot_ends_the_worker_before_a_wrong_token_is_sent():
    pool = len(PROMPTS[1]) + SETTING.budget + SETTING.buffer + 60
    with pytest.raises(SchedulerFailed, match="Out of memory") as caught:
        requests = [greedy(PROMPTS[1], NUM_TOKENS)]
        flags = ["--model-path", str(MODEL), "--max-total-tokens", str(pool), *SETTING.flags]
        run_scheduler(flags, requests, controls=paused_after(150), env={"RKV_SABOTAGE": "restore@1"})
    (output,) = caught.value.outputs
    assert output.finish_reason is None
    assert_right_so_far(output, PROMPTS[1], 100)
