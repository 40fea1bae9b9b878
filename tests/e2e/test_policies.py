"""Every policy on the real server, against the dense oracle with that policy."""

import pytest

from devtools.tiny_models import tiny_model_path
from rkv_sglang.policies.registry import POLICIES
from tests.e2e.workload import assert_same_tokens, greedy, outputs_at_retractions, retracting, six_prompts
from tests.support.harness.scheduler import run_scheduler
from tests.support.oracle.dense import dense_generate
from tests.support.oracle.policy_scores import score_function

BUDGET, BUFFER = 37, 23
NUM_TOKENS = 180


@pytest.mark.parametrize("model_name, page_size", [("llama-gqa", 16), ("qwen3", 1)])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "rkv"])
def test_tokens_equal_the_dense_oracle(policy, model_name, page_size):
    model = tiny_model_path(model_name)
    prompts = six_prompts()[1:5]
    flags = ["--model-path", str(model), "--page-size", str(page_size), "--kv-policy", policy]
    flags += ["--rkv-budget", str(BUDGET), "--rkv-buffer", str(BUFFER)]
    result = run_scheduler(flags, [greedy(prompt, NUM_TOKENS) for prompt in prompts])
    result.assert_clean()
    num_compactions = 0
    for prompt, output in zip(prompts, result.outputs, strict=True):
        expected = dense_generate(model, prompt, NUM_TOKENS, budget=BUDGET, buffer=BUFFER, score=score_function(policy))
        assert_same_tokens(output.output_ids, expected, f"prompt of {len(prompt)}")
        assert len(expected.compactions) >= 3
        num_compactions += len(expected.compactions)
    assert len(result.probe.compactions) == num_compactions


def test_a_stateful_policy_forgets_what_a_retraction_dropped():
    model = tiny_model_path("llama-gqa")
    prompts = six_prompts()[:4]
    flags = ["--model-path", str(model), "--kv-policy", "h2o", "--rkv-budget", str(BUDGET), "--rkv-buffer", str(BUFFER)]
    result = run_scheduler(flags, [greedy(prompt, NUM_TOKENS) for prompt in prompts], env=retracting(71))
    result.assert_clean()
    assert result.probe.retractions >= 1
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        points = outputs_at_retractions(result, f"r{i:05d}")
        expected = dense_generate(
            model,
            prompt,
            NUM_TOKENS,
            budget=BUDGET,
            buffer=BUFFER,
            score=score_function("h2o"),
            recompute_at=points,
        )
        assert_same_tokens(output.output_ids, expected, f"request {i}, recomputed at {points}")
