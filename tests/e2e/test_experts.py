"""A model whose layers choose among experts: attention is that of others, and so is its compaction."""

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, masked_oracle, six_prompts
from tests.support.harness.scheduler import run_scheduler

SETTINGS = (Setting(budget=37, buffer=23), Setting(budget=43, buffer=16, policy="random_attention", block=16))


@pytest.mark.parametrize("setting", SETTINGS, ids=["gather", "drop"])
def test_tokens_equal_those_of_a_model_that_sees_what_was_kept(setting):
    path = tiny_model_path("qwen3-moe")
    prompts = six_prompts()[1:3]
    requests = [greedy(prompt, setting.budget + 3 * setting.buffer + 5) for prompt in prompts]
    result = run_scheduler(["--model-path", str(path), *setting.flags], requests)
    result.assert_clean()
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        expected = masked_oracle(path, prompt, setting, output.output_ids)
        assert len(expected.compactions) == 3
        assert_same_tokens(output.output_ids, expected, f"request {i}")
