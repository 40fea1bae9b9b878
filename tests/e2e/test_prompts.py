"""A request's long prompt is compacted into slots of its own, and the radix tree's are never written."""

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, oracle, six_prompts
from tests.support.harness.scheduler import run_scheduler

MODEL = tiny_model_path("llama-gqa")
FLAGS = ["--model-path", str(MODEL)]
POLICIES = ["rkv", "snapkv", "streaming_llm", "random_attention"]
NUM_TOKENS = 90


def setting_of(policy: str, prompt_budget: int = 40) -> Setting:
    return Setting(budget=24, buffer=16, policy=policy, prompt_budget=prompt_budget)


@pytest.mark.parametrize(
    "policy, page_size, extra",
    [
        ("rkv", 1, []),
        ("snapkv", 16, ["--chunked-prefill-size", "32"]),
        ("streaming_llm", 16, ["--disable-overlap-schedule"]),
        ("random_attention", 1, ["--disable-radix-cache"]),
        ("rkv", 16, ["--disable-radix-cache", "--chunked-prefill-size", "32"]),
        ("h2o", 4, []),
    ],
)
def test_six_requests_that_share_a_prefix_answer_as_the_oracle_says(policy, page_size, extra):
    setting, prompts = setting_of(policy), six_prompts()
    # Some find the prefix in the cache, some come while others decode, and one comes back to a prompt that was cached.
    requests = [greedy(prompt, NUM_TOKENS, at_step=7 * i) for i, prompt in enumerate(prompts)]
    requests.append(greedy(prompts[3], NUM_TOKENS, when_idle=True))
    flags = [*FLAGS, "--page-size", str(page_size), *setting.flags, *extra]
    result = run_scheduler(flags, requests)
    result.assert_clean()
    for i, (prompt, output) in enumerate(zip([*prompts, prompts[3]], result.outputs, strict=True)):
        expected = oracle(MODEL, prompt, NUM_TOKENS, setting)
        assert len(expected.compactions) == 4 + (len(prompt) > 40)
        assert_same_tokens(output.output_ids, expected, f"request {i}")
        assert output.info["kv_prompt_tokens"] == min(len(prompt), 40)
    if "--disable-radix-cache" not in extra:
        # Whole pages of the whole prompt, whatever its owner kept of it.
        assert result.outputs[6].cached_tokens >= len(prompts[3]) - page_size
