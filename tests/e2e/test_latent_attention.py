"""A model whose cache is one latent vector a token (MLA): dropping blocks from the map does not mind.

SGLang serves it on a CPU with Triton kernels in the interpreter only, so these runs fork from a helper of their own.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from devtools.tiny_models import MLA_MODEL, tiny_model_path
from tests.e2e.workload import (
    Setting,
    assert_same_tokens,
    greedy,
    masked_oracle,
    outputs_at_restores,
    random_ids,
    six_prompts,
)
from tests.support.harness import scheduler
from tests.support.harness.gate import Control
from tests.support.oracle.decoder import load_model
from tests.support.oracle.masked_compact import MaskedResult
from tests.support.oracle.masked_forward import masked_forward

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
    ("policy", "prompt_len", "num_slots", "extra"),
    [
        # More tokens are generated than there are slots.
        ("random_attention", 16, NUM_TOKENS[0] - 2, []),
        ("streaming_llm", 35, 80, ["--chunked-prefill-size", "16", "--page-size", "16"]),
    ],
    ids=["random_attention", "streaming_llm-chunks"],
)
def test_tokens_equal_those_of_a_model_that_never_sees_what_was_dropped(policy, prompt_len, num_slots, extra):
    model, setting = tiny_model_path(MLA_MODEL), Setting(budget=24, buffer=16, policy=policy, block=16)
    # The second finds the first's prompt in the radix cache. The first sees more than the pool holds.
    prompts = [six_prompts()[0][:prompt_len], (*six_prompts()[0][:32], 7, 8, 9)][: 1 + bool(extra)]
    flags = ["--model-path", str(model), "--attention-backend", "triton", "--context-length", "512"]
    flags += [*setting.flags, *extra, "--max-total-tokens", str(num_slots)]
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


def answer_by_hand(model: Path, prompt: Sequence[int], found: Sequence[int], window: int) -> MaskedResult:
    """Return the best token of each place of an answer to a prompt of 74 tokens, in one pass over what was ``found``.

    What the oldest blocks are is worked out by hand.
    """
    ids, resident = [*prompt, *found[:-1]], [*range(74)]
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for token in range(74, len(ids)):
        if token == 74 + window:
            # Of the prompt two of three blocks behind the first; the window is behind them.
            del resident[16:48]
        if len(resident) == 42 + 40:
            # The only whole block between the prompt's end and the window.
            del resident[48:64]
        resident.append(token)
        visible[token] = False
        visible[token, resident] = True
    config = load_model(model).config
    shape = config.num_hidden_layers, config.num_key_value_heads
    logits = masked_forward(load_model(model), ids, visible.expand(*shape, -1, -1)).logits[len(prompt) - 1 :]
    best = logits.topk(2)
    gaps = best.values[:, 0] - best.values[:, 1]
    return MaskedResult(best.indices[:, 0].tolist(), gaps.tolist())


def test_blocks_of_a_prompt_are_never_seen_again(rng):
    model = tiny_model_path(MLA_MODEL)
    setting = Setting(budget=24, buffer=16, policy="streaming_llm", block=16, prompt_budget=40)
    prompt, num_tokens = random_ids(rng, 74), 44
    flags = ["--model-path", str(model), "--attention-backend", "triton", "--context-length", "512"]
    result = scheduler.run_scheduler(
        [*flags, *setting.flags, "--max-total-tokens", "192"],
        [greedy(prompt, num_tokens)],
        env={"TRITON_INTERPRET": "1", "RKV_SGLANG_VERIFY": "1"},
        timeout=500,
    )
    result.assert_clean()
    assert [event["of_prompt"] for event in result.probe.compactions] == [True, False]
    (output,) = result.outputs
    assert output.info["kv_prompt_tokens"] == 42
    expected = answer_by_hand(model, prompt, output.output_ids, setting.window)
    assert len(expected.output_ids) == num_tokens
    assert_same_tokens(output.output_ids, expected, "a prompt without blocks")
