"""An answer that comes back as prompt, and is marked, is compacted as if it had never been interrupted."""

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, random_ids
from tests.support.harness.scheduler import Request, RunResult, rid_of, run_scheduler
from tests.support.oracle.dense import DenseResult, dense_generate

MODEL = tiny_model_path("llama-gqa")
NUM_TOKENS = 150
# Less than the budget, no window below the capacity, more than twice the capacity.
CARRIED = (9, 30, 88)


def uninterrupted(prompt: list[int], carried: int, setting: Setting, prompt_budget: int = 0) -> DenseResult:
    """Return what the oracle answers whose KV is computed again in full after so many tokens."""
    return dense_generate(
        MODEL,
        prompt,
        NUM_TOKENS,
        budget=setting.budget,
        buffer=setting.buffer,
        recompute_at=(carried,),
        early=setting.early if setting.stagger else None,
        score=setting.score,
        block=setting.block,
        prompt_budget=prompt_budget or None,
    )


def rest_of(prompt: list[int], answer: DenseResult, carried: int, **fields: object) -> Request:
    request = greedy([*prompt, *answer.output_ids[:carried]], NUM_TOKENS - carried, **fields)
    request.sampling_params["custom_params"] = {"kv_prompt_len": len(prompt)}
    return request


def held_by(result: RunResult, index: int) -> list[int]:
    return [entry["allocated_len"] for entry in result.probe.per_request(rid_of(index))]


@pytest.mark.parametrize(
    ("setting", "page_size"),
    [(Setting(budget=21, buffer=12, stagger=True), 1), (Setting(budget=24, buffer=16, block=16), 16)],
    ids=["every head for itself, staggered", "one choice for a request, pages of 16"],
)
def test_the_rest_of_an_answer_is_that_of_an_uninterrupted_run(setting, page_size, rng):
    prompts = [random_ids(rng, length) for length in (45, 7, 33)]
    # Of marked prompts some is dropped, too, where every head chooses for itself; what was generated never counts as
    # one.
    prompt_budget = 20 if setting.block is None else 0
    answers = [
        uninterrupted(prompt, carried, setting, prompt_budget) for prompt, carried in zip(prompts, CARRIED, strict=True)
    ]
    # A stranger with the same tokens, unmarked, puts them all into the tree first.
    stranger = greedy([*prompts[2], *answers[2].output_ids[: CARRIED[2]]], 2)
    rests = [
        rest_of(prompt, answer, carried, when_idle=True)
        for prompt, answer, carried in zip(prompts, answers, CARRIED, strict=True)
    ]
    for rest in rests if prompt_budget else []:
        rest.sampling_params["custom_params"]["kv_prompt_budget"] = prompt_budget
    result = run_scheduler(
        ["--model-path", str(MODEL), "--page-size", str(page_size), *setting.flags], [stranger, *rests]
    )
    result.assert_clean()
    for i, (answer, carried) in enumerate(zip(answers, CARRIED, strict=True), start=1):
        expected = DenseResult(**{**vars(answer), "output_ids": answer.output_ids[carried:]})
        assert_same_tokens(result.outputs[i].output_ids, expected, f"after {carried} tokens")
        assert result.outputs[i].info["kv_compactions"] > 0
        kept = prompt_budget if 0 < prompt_budget < len(prompts[i - 1]) else len(prompts[i - 1])
        assert result.outputs[i].info["kv_prompt_tokens"] == kept
        # Once its history was compacted, it holds no more than any other request.
        capacity = len(prompts[i - 1]) + setting.budget + setting.buffer + (setting.block or 1)
        held = held_by(result, i)
        assert max(held[-20:]) <= capacity < max([*held, carried + len(prompts[i - 1])]) or carried < 40
    assert result.outputs[3].cached_tokens <= len(prompts[2])


def test_rests_that_fill_the_pool_are_admitted_exactly_and_none_is_preempted(rng):
    setting = Setting(budget=21, buffer=12)
    prompts = [random_ids(rng, 20) for _ in range(4)]
    answers = [uninterrupted(prompt, 40, setting) for prompt in prompts]
    rests = [rest_of(prompt, answer, 40) for prompt, answer in zip(prompts, answers, strict=True)]
    # Prompt and history, the window of queries that its first compaction waits for, and nothing more: two at a time.
    pool = 2 * (20 + 40 + setting.window)
    # Admitted in the order of what they find in the tree, too.
    flags = ["--model-path", str(MODEL), *setting.flags, "--schedule-policy", "lpm", "--max-total-tokens", str(pool)]
    result = run_scheduler(flags, rests)
    result.assert_clean()
    for i, answer in enumerate(answers):
        expected = DenseResult(**{**vars(answer), "output_ids": answer.output_ids[40:]})
        assert_same_tokens(result.outputs[i].output_ids, expected, "in a full pool")
        assert result.outputs[i].retractions == 0
    running = [sum(rid_of(i) in step for i in range(4)) for step in _rids_at_steps(result)]
    assert max(running) == 2


def _rids_at_steps(result: RunResult) -> list[set[str]]:
    steps: dict[int, set[str]] = {}
    for i in range(len(result.outputs)):
        for entry in result.probe.per_request(rid_of(i)):
            steps.setdefault(entry["step"], set()).add(rid_of(i))
    return list(steps.values())
