"""Layers that attend to the latest tokens alone, in one pool with all others: they lose nothing by a compaction."""

import pytest

from devtools.tiny_models import FULL, SINKS_MODEL, SLIDING, SLIDING_WINDOW, tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, masked_oracle, oracle, random_ids, six_prompts
from tests.support.harness.scheduler import rid_of, run_scheduler
from tests.support.oracle.decoder import load_model

PAGES = ["--page-size", "16"]
# Of the models that have both kinds of layers, and of one that has none of the other kind.
CASES = [
    # SGLang would keep its windows in a second pool, and those of gpt-oss.
    ("mellum", Setting(budget=37, buffer=23), PAGES),
    ("olmo3", Setting(budget=59, buffer=32, window=SLIDING_WINDOW, policy="snapkv", block=16), PAGES),
    ("gemma3", Setting(budget=SLIDING_WINDOW, buffer=31, policy="snapkv"), []),
    ("olmo3-sliding", Setting(budget=30, buffer=23), []),
    # SGLang's own backend of Blackwell, but for its kernels: on a CPU no other takes attention sinks.
    (SINKS_MODEL, Setting(budget=37, buffer=23), ["--attention-backend", "triton", *PAGES]),
]
IDS = ["mellum-gather", "olmo3-drop", "gemma3-gather", "olmo3-sliding-gather", "gpt-oss-gather"]


@pytest.mark.parametrize(("name", "setting", "flags"), CASES, ids=IDS)
def test_tokens_equal_those_of_a_model_that_sees_what_was_kept(name, setting, flags):
    path = tiny_model_path(name)
    num_tokens = setting.budget + 3 * setting.buffer + 5
    # One is shorter than the window, one is longer.
    prompts = six_prompts()[4:6]
    requests = [greedy(prompt, num_tokens) for prompt in prompts]
    # One that would keep less than the window is refused alone.
    requests.append(greedy(prompts[0], num_tokens))
    requests[-1].sampling_params["custom_params"] = {"kv_budget": SLIDING_WINDOW - 1}
    env = {"RKV_STAND_IN_TRTLLM": "1"} if name == SINKS_MODEL else {}
    result = run_scheduler(["--model-path", str(path), *flags, *setting.flags], requests, env=env)
    layer_types = load_model(path).config.layer_types
    # Where every layer slides, nothing is lost, so the answer is that of no policy.
    is_lossless = FULL not in layer_types
    windows = [SLIDING_WINDOW if kind == SLIDING else None for kind in layer_types]
    *outputs, refused = result.outputs
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        lossless = {"budget": 10**6} if is_lossless else {}
        expected = masked_oracle(path, prompt, setting, output.output_ids, windows=windows, **lossless)
        assert len(expected.compactions) == (0 if is_lossless else 3)
        assert len(output.output_ids) == num_tokens
        assert_same_tokens(output.output_ids, expected, f"request {i}")
    assert len(result.probe.compactions) == 3 * len(prompts)
    has_second_pool = name in ("mellum", SINKS_MODEL)
    assert result.log.count("--disable-hybrid-swa-memory is set, because a KV policy keeps") == has_second_pool
    assert refused.finish_reason["type"] == "abort" and refused.finish_reason["status_code"] == 400
    why = (
        "some of the model's layers attend to the latest 24 tokens" if setting.block is None else "the window of 24 is"
    )
    assert refused.finish_reason["message"].startswith(f"kv_budget {SLIDING_WINDOW - 1} is not an integer of at least")
    assert f" ({why}" in refused.finish_reason["message"]


def test_blocks_leave_a_prompt_in_front_of_what_windows_take_in(rng):
    path = tiny_model_path("olmo3")
    setting = Setting(budget=59, buffer=32, window=SLIDING_WINDOW, policy="snapkv", block=16, prompt_budget=56)
    num_tokens = setting.budget + 2 * setting.buffer + 5
    # Of 74 tokens one block goes of two that may, of 131 four of five; most of the first is found in the tree then.
    shared = random_ids(rng, 71)
    prompts = [(*shared, *random_ids(rng, length)) for length in (3, 60)]
    requests = [greedy(prompt, num_tokens, at_step=7 * i) for i, prompt in enumerate(prompts)]
    flags = ["--model-path", str(path), *PAGES, *setting.flags]
    result = run_scheduler(flags, requests, env={"RKV_SGLANG_VERIFY": "1"})
    result.assert_clean()
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        expected = oracle(path, prompt, num_tokens, setting, output.output_ids)
        assert len(output.output_ids) == num_tokens and len(expected.compactions) == 3
        own = [event["of_prompt"] for event in result.probe.compactions if event["rid"] == rid_of(i)]
        assert own == [True, False, False]
        assert output.info["kv_prompt_tokens"] == (58, 67)[i]
        assert_same_tokens(output.output_ids, expected, f"request {i}")
