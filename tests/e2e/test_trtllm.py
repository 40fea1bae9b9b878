"""SGLang's attention backend trtllm_mha on compacted rows: all of it but its kernels, which are torch here."""

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, oracle, six_prompts
from tests.support.harness.scheduler import run_scheduler

# The backend takes pages of 16, 32 and 64.
CASES = [
    ("llama-gqa", Setting(budget=37, buffer=23), ["--page-size", "16"]),
    (
        "qwen3",
        Setting(budget=75, buffer=32, window=9, policy="random_attention", block=32),
        # One for prefill and one for decode steps, as SGLang has them where they differ.
        ["--page-size", "32", "--prefill-attention-backend", "triton", "--decode-attention-backend", "torch_native"],
    ),
]


@pytest.mark.parametrize(("model", "setting", "flags"), CASES, ids=["gather", "drop"])
def test_tokens_equal_the_dense_oracle(model, setting, flags):
    num_tokens = setting.budget + 2 * setting.buffer + 5
    prompts = six_prompts()[1:3]
    # The second begins as the first, which is in the radix cache by then, and is prefilled in chunks.
    requests = [greedy(prompt, num_tokens, when_idle=True) for i, prompt in enumerate(prompts)]
    flags = [*flags, "--chunked-prefill-size", "64", "--context-length", "512", *setting.flags]
    result = run_scheduler(
        ["--model-path", str(tiny_model_path(model)), *flags], requests, env={"RKV_STAND_IN_TRTLLM": "1"}
    )
    result.assert_clean()
    assert result.outputs[1].cached_tokens >= 64
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        expected = oracle(tiny_model_path(model), prompt, num_tokens, setting, output.output_ids)
        assert len(expected.compactions) == 2
        assert_same_tokens(output.output_ids, expected, f"request {i}")
    assert len(result.probe.compactions) == 2 * len(prompts)
