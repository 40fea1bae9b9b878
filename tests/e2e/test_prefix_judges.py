"""Documents that all of a task judges, or the document itself repeated, and requests that go on from what is left."""

from functools import cache

import pytest

from tests.e2e.named_prefixes import (
    BUDGET,
    CREATE,
    FLAGS,
    LENGTH,
    MODEL,
    NUM_TOKENS,
    answer_behind,
    asking,
    behind,
    texts,
)
from tests.e2e.workload import Setting, assert_same_tokens, greedy
from tests.support.harness.scheduler import run_scheduler
from tests.support.oracle.dense import SCORE_TOLERANCE, Prefix, dense_prefix
from tests.support.oracle.judges import judged_by

SETTING = Setting(budget=24, buffer=16)


@cache
def prefix_of(judge: str) -> Prefix:
    task = behind(judge)
    judged = judged_by(judge, SETTING.score, length=LENGTH, num_behind=len(task))
    prefix = dense_prefix(MODEL, texts()[0], task, BUDGET, **judged)
    assert prefix.compaction.margins.min() > SCORE_TOLERANCE
    return prefix


@pytest.mark.parametrize(
    "page_size, extra, is_cached",
    [
        (1, [], True),
        # Document, task and repeat over several chunks.
        (16, ["--chunked-prefill-size", "32"], False),
        (1, ["--chunked-prefill-size", "48", "--disable-overlap-schedule"], True),
    ],
)
def test_requests_go_on_from_what_a_task_or_a_repeat_says_is_best(page_size, extra, is_cached):
    document, _, prompts = texts()
    judges = {judge: [*document, *behind(judge)] for judge in ("task", "repeat")}
    requests = [greedy(whole, 2) for whole in judges.values() if is_cached]
    num_before = len(requests)
    for judge, whole in judges.items():
        requests.append(asking({**CREATE, "create": judge, "judge": judge}, whole, when_idle=True))
    used = [(judge, prompt) for judge in judges for prompt in (prompts[0], prompts[2])]
    requests += [asking(judge, prompt, NUM_TOKENS, when_idle=i == 0) for i, (judge, prompt) in enumerate(used)]
    flags = [*FLAGS, "--page-size", str(page_size), *SETTING.flags, *extra]
    env = {"RKV_SGLANG_VERIFY": "1", "RKV_PROBE_MAX_LOCKED": str(2 * BUDGET)}
    result = run_scheduler(flags, requests, env=env)
    result.assert_clean()
    made, answers = result.outputs[num_before : num_before + 2], result.outputs[num_before + 2 :]
    for judge, output in zip(judges, made, strict=True):
        assert output.info["kv_prefix"] == {"name": judge, "length": LENGTH, "budget": BUDGET, "judge": judge}
        # The second finds the first's document. What is behind it is computed, whatever the cache has.
        is_found = is_cached or judge == "repeat"
        assert output.cached_tokens == (LENGTH // page_size * page_size if is_found else 0)
    for (judge, prompt), output in zip(used, answers, strict=True):
        assert len(output.output_ids) == NUM_TOKENS
        expected = answer_behind(prefix_of(judge), SETTING, prompt, output.output_ids)
        assert_same_tokens(output.output_ids, expected, f"{judge}, a prompt of {len(prompt)}")
        assert output.info["kv_prefix"]["judge"] == judge
