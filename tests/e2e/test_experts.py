"""A model whose layers choose among experts: attention is that of others, and so is its compaction."""

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, greedy, six_prompts
from tests.support.harness.scheduler import run_scheduler
from tests.support.oracle.decoder import load_model
from tests.support.oracle.masked_compact import masked_compact

SETTINGS = [Setting(budget=37, buffer=23), Setting(budget=43, buffer=32, policy="snapkv", block=16)]


@pytest.mark.parametrize("setting", SETTINGS, ids=["gather", "drop"])
def test_tokens_equal_those_of_a_model_that_sees_what_was_kept(setting):
    path = tiny_model_path("qwen3-moe")
    num_tokens = setting.budget + 3 * setting.buffer + 5
    prompts = six_prompts()[1:3]
    requests = [greedy(prompt, num_tokens) for prompt in prompts]
    result = run_scheduler(["--model-path", str(path), *setting.flags], requests)
    result.assert_clean()
    for prompt, output in zip(prompts, result.outputs, strict=True):
        sizes = {"budget": setting.budget, "buffer": setting.buffer, "window": setting.window, "block": setting.block}
        expected = masked_compact(load_model(path), prompt, num_tokens, **sizes, score=setting.score)
        assert len(expected.compactions) == 3
        differs = [i for i in range(num_tokens) if output.output_ids[i] != expected.output_ids[i]]
        assert not differs, f"token {differs[0]} differs, where the oracle's gap is {expected.logit_gaps[differs[0]]}"
