"""Named prefixes of servers that keep the same in all layers and heads: whole blocks of a document are left out."""

import re
from functools import cache

import pytest

from devtools.tiny_models import SLIDING_WINDOW, tiny_model_path
from rkv_sglang.cache.trace import unpack_kept
from tests.e2e.named_prefixes import (
    FLAGS,
    MODEL,
    NAME,
    NUM_TOKENS,
    SHARED_LEN,
    answer_behind,
    asking,
    behind,
    refusal_of,
    texts,
)
from tests.e2e.workload import (
    Setting,
    assert_same_tokens,
    greedy,
    outputs_at_restores,
    outputs_at_retractions,
    random_ids,
    retracting,
)
from tests.support.harness.scheduler import rid_of, run_scheduler
from tests.support.oracle.dense import Prefix, dense_prefix
from tests.support.oracle.judges import judged_by

BLOCK, BUDGET = 16, 48
VERIFYING = {"RKV_SGLANG_VERIFY": "1"}


def setting_of(policy: str) -> Setting:
    return Setting(budget=24, buffer=16, policy=policy, block=BLOCK)


@cache
def prefix_of(policy: str, judge: str, length: int) -> Prefix:
    task = behind(judge, length)
    judged = judged_by(judge, setting_of(policy).score, length=length, num_behind=len(task))
    return dense_prefix(MODEL, texts()[0][:length], task, BUDGET, block=BLOCK, **judged)


@pytest.mark.parametrize(
    "policy, judge, page_size, extra",
    [
        ("rkv", "policy", 1, []),
        ("rkv", "task", 16, ["--chunked-prefill-size", "32"]),
        ("rkv", "repeat", 1, ["--disable-overlap-schedule"]),
        ("snapkv", "policy", 16, ["--chunked-prefill-size", "32", "--disable-overlap-schedule"]),
        ("streaming_llm", "policy", 1, ["--chunked-prefill-size", "32"]),
        ("random_attention", "policy", 16, []),
        ("random_attention", "policy", 1, ["--disable-overlap-schedule"]),
    ],
)
def test_requests_that_share_it_answer_as_the_oracle_says(policy, judge, page_size, extra):
    document, _, prompts = texts()
    # Of so many tokens a page of 16 has no part; else up to a block stays above the budget.
    length, kept = (80, 48) if page_size == BLOCK else (90, 58)
    whole = [*document[:length], *behind(judge, length)]
    create = {"create": NAME, "length": length, "budget": BUDGET, "judge": judge}
    requests = [
        greedy(whole, 2),
        asking(create, whole, when_idle=True),
        *[asking(NAME, prompt, NUM_TOKENS, when_idle=i < 2) for i, prompt in enumerate(prompts)],
        asking(NAME, prompts[2], NUM_TOKENS, when_idle=True),
        greedy(whole, 8),
        asking({"delete": NAME}, [5], when_idle=True),
    ]
    requests[1].sampling_params["custom_params"]["kv_trace"] = True
    flags = [*FLAGS, "--page-size", str(page_size), *setting_of(policy).flags, "--kv-trace", *extra]
    result = run_scheduler(flags, requests, env={**VERIFYING, "RKV_PROBE_MAX_LOCKED": str(kept)})
    result.assert_clean()
    info = {"name": NAME, "length": length, "budget": kept, "judge": judge}
    said = [output.info.get("kv_prefix") for output in result.outputs]
    assert said == [None, info, *[info] * 7, None, {"deleted": NAME}]
    prefix = prefix_of(policy, judge, length)
    assert prefix.caches[0].length == kept
    (stayed,) = unpack_kept(result.outputs[1].info["kv_trace"]["document"], 1, 1)[0]
    of_oracle = prefix.compaction.kept_positions[0, 0]
    assert stayed.nonzero()[0].tolist() == of_oracle[of_oracle < length].tolist()
    for i, request in enumerate(requests[2:9], 2):
        output = result.outputs[i]
        assert len(output.output_ids) == NUM_TOKENS
        expected = answer_behind(prefix, setting_of(policy), request.input_ids, output.output_ids)
        assert_same_tokens(output.output_ids, expected, f"request {i}")
        assert output.info["kv_compactions"] == 2
        assert output.info["kv_prompt_tokens"] == kept + len(request.input_ids)
    shared = (kept + SHARED_LEN) // page_size * page_size
    assert [output.cached_tokens >= shared for output in result.outputs[2:6]] == [False, True, True, True]
    assert result.outputs[8].cached_tokens >= kept + len(prompts[2]) - page_size
    assert result.outputs[9].cached_tokens >= len(whole) - page_size
    assert [idle["protected"] for idle in result.probe.idles][-6:] == [0, *[kept] * 4, 0]


@pytest.mark.parametrize(
    ("policy", "pool", "interval"), [("rkv", 176, 130), ("random_attention", 176, 130), ("random_attention", 500, 30)]
)
def test_a_preempted_request_comes_back_behind_it(policy, pool, interval, rng):
    """What it had kept is restored where the pool does not hold all that it has seen; else it is computed again."""
    setting, length, num_tokens = setting_of(policy), 64, 190 if pool < 200 else 100
    document, task = random_ids(rng, length), random_ids(rng, 9)
    prompts = [random_ids(rng, 17) for _ in range(2)]
    create = {"create": NAME, "length": length, "budget": BUDGET}
    requests = [asking(create, [*document, *task])]
    requests += [asking(NAME, prompt, num_tokens, when_idle=i == 0) for i, prompt in enumerate(prompts)]
    flags = [*FLAGS, "--max-total-tokens", str(pool), *setting.flags]
    env = {**retracting(interval), **VERIFYING, "RKV_PROBE_MAX_LOCKED": str(BUDGET)}
    result = run_scheduler(flags, requests, env=env)
    result.assert_clean()
    prefix = dense_prefix(MODEL, document, task, BUDGET, score=setting.score, block=BLOCK)
    restores = [outputs_at_restores(result, rid_of(i)) for i in (1, 2)]
    recomputed = [outputs_at_retractions(result, rid_of(i)) for i in (1, 2)]
    assert any(restores if pool < 200 else recomputed)
    for i, prompt in enumerate(prompts, 1):
        found = result.outputs[i].output_ids
        assert len(found) == num_tokens
        comebacks = {"recompute_at": recomputed[i - 1], "restore_at": restores[i - 1], "restored_in_flight": True}
        expected = answer_behind(prefix, setting, prompt, found, **comebacks)
        assert_same_tokens(found, expected, f"request {i}, restored at {restores[i - 1]}")


def test_layers_that_slide_find_the_latest_of_a_document(rng):
    path, window = tiny_model_path("olmo3"), SLIDING_WINDOW
    setting = Setting(budget=59, buffer=32, window=window, policy="snapkv", block=BLOCK)
    document, task, prompt = (random_ids(rng, n) for n in (112, 30, 9))
    create = {"create": NAME, "length": 112, "budget": 64}
    requests = [asking(create, [*document, *task]), asking(NAME, prompt, 130, when_idle=True)]
    env = {**VERIFYING, "RKV_PROBE_MAX_LOCKED": "64"}
    result = run_scheduler(["--model-path", str(path), "--page-size", "16", *setting.flags], requests, env=env)
    result.assert_clean()
    prefix = dense_prefix(path, document, task, 64, window=window, score=setting.score, block=BLOCK)
    found = result.outputs[1].output_ids
    expected = answer_behind(prefix, setting, prompt, found, model=path)
    assert len(expected.compactions) == 2
    assert_same_tokens(found, expected, "behind a prefix")


def test_what_does_not_fit_whole_blocks_is_answered_in_one_line():
    document, task, _ = texts()
    whole = [*document, *task]
    bad = {
        "length 90 is no multiple of the page of 16 .* whole blocks go .*: set it to 80, and": (90, 48, "policy"),
        "budget 39 leaves nothing to choose: .*, and blocks of 16 go whole; set it to 40 or more$": (80, 39, "policy"),
        "length 55 leaves no block of 16 .* beside the 40 .*: send a document of 56 tokens": (55, 40, "policy"),
        "budget 65 is less than a block of 16 below the length of 80 .*: set it to 64 or less$": (80, 65, "policy"),
        "judge 'task' looks at keys, and this server's policy 'random_attention' looks at none": (80, 48, "task"),
    }
    requests = [
        asking({"create": NAME, "length": length, "budget": budget, "judge": judge}, whole)
        for length, budget, judge in bad.values()
    ]
    flags = [*FLAGS, "--page-size", "16", *setting_of("random_attention").flags]
    result = run_scheduler(flags, requests)
    result.assert_clean()
    for output, line in zip(result.outputs, bad, strict=True):
        assert re.search(line, refusal_of(output)), (line, output.finish_reason)
