"""A model whose cache is one latent vector a token (MLA): dropping blocks from the map does not mind.

SGLang serves it on a CPU with Triton kernels in the interpreter only, so these runs fork from a helper of their own.
"""

from collections.abc import Iterator

import pytest

from devtools.tiny_models import MLA_MODEL, tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, masked_oracle, outputs_at_restores, six_prompts
from tests.support.harness import scheduler
from tests.support.harness.gate import Control

# Two compactions, and time to come back; one is enough for who only shares a prefix.
NUM_TOKENS = (66, 44)
# After the second compaction, and longer before the third than a request takes to have its queries.
PAUSE, RESTORES = 58, range(57, 65)


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """Triton decides it where a kernel is defined, that is when SGLang is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(scheduler._Zygote, "_instance", None)
        yield
        if scheduler._Zygote._instance is not None:
            scheduler._Zygote._instance.close()


@pytest.mark.parametrize(
    ("policy", "extra"),
    [("random_attention", []), ("streaming_llm", ["--chunked-prefill-size", "16", "--page-size", "16"])],
    ids=["random_attention", "streaming_llm-chunks"],
)
def test_tokens_equal_those_of_a_model_that_never_sees_what_was_dropped(policy, extra):
    model, setting = tiny_model_path(MLA_MODEL), Setting(budget=24, buffer=16, policy=policy, block=16)
    # The second finds the first's prompt in the radix cache. Each sees more than the pool holds.
    prompts = [six_prompts()[0][:35], (*six_prompts()[0][:32], 7, 8, 9)][: 1 + bool(extra)]
    flags = ["--model-path", str(model), "--attention-backend", "triton", "--context-length", "512"]
    flags += [*setting.flags, *extra, "--max-total-tokens", "80"]
    requests = [greedy(*own, when_idle=True) for own in zip(prompts, NUM_TOKENS, strict=False)]
    is_paused = not extra
    controls = [
        Control(0, "PauseGenerationReqInput", {"mode": "retract"}, after_tokens=(scheduler.rid_of(0), PAUSE)),
        Control(0, "ContinueGenerationReqInput", {"torch_empty_cache": False}, wait=3),
    ]
    result = scheduler.run_scheduler(
        flags,
        requests,
        controls=controls if is_paused else [],
        env={"TRITON_INTERPRET": "1", "RKV_PROBE_MOVES_NOTHING": "1"},
        timeout=500,
    )
    result.assert_clean()
    # It has seen more than the pool holds, so it comes back with what it had kept.
    restores = outputs_at_restores(result, scheduler.rid_of(0))
    assert len(restores) == is_paused and all(number in RESTORES for number in restores)
    assert [output.cached_tokens for output in result.outputs] == [0, 32][: len(prompts)]
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        expected = masked_oracle(model, prompt, setting, output.output_ids)
        num_compactions = 2 - i
        assert len(output.output_ids) == NUM_TOKENS[i] and len(expected.compactions) == num_compactions
        assert sum(event["rid"] == scheduler.rid_of(i) for event in result.probe.compactions) == num_compactions
        assert_same_tokens(output.output_ids, expected, f"request {i}")
