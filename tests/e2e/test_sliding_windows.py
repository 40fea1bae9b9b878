"""Layers that attend to the latest tokens alone, in one pool with all others: they lose nothing by a compaction."""

import pytest

from devtools.tiny_models import FULL, SLIDING, SLIDING_WINDOW, tiny_model_path
from tests.e2e.workload import Setting, greedy, six_prompts
from tests.support.harness.scheduler import LauncherRefused, run_scheduler
from tests.support.oracle.decoder import load_model
from tests.support.oracle.masked_compact import masked_compact

PAGES = ["--page-size", "16"]
# Of the models that have both kinds of layers, and of one that has none of the other kind.
CASES = [
    ("olmo3", Setting(budget=37, buffer=23), PAGES),
    ("olmo3", Setting(budget=59, buffer=32, window=SLIDING_WINDOW, policy="snapkv", block=16), PAGES),
    ("gemma3", Setting(budget=SLIDING_WINDOW, buffer=31, policy="snapkv"), []),
    ("olmo3-sliding", Setting(budget=30, buffer=23), []),
    ("olmo3-sliding", Setting(budget=40, buffer=32, window=SLIDING_WINDOW, policy="random_attention", block=16), []),
]


@pytest.mark.parametrize(("name", "setting", "flags"), CASES, ids=lambda part: getattr(part, "policy", str(part)[:13]))
def test_tokens_equal_those_of_a_model_that_sees_what_was_kept(name, setting, flags):
    path = tiny_model_path(name)
    num_tokens = setting.budget + 3 * setting.buffer + 5
    # One is shorter than the window, one is longer.
    prompts = (six_prompts()[4], six_prompts()[5])
    requests = [greedy(prompt, num_tokens) for prompt in prompts]
    result = run_scheduler(["--model-path", str(path), *flags, *setting.flags], requests)
    result.assert_clean()
    layer_types = load_model(path).config.layer_types
    # Where every layer slides, nothing is lost, so the answer is that of no policy.
    is_lossless = FULL not in layer_types
    for prompt, output in zip(prompts, result.outputs, strict=True):
        expected = masked_compact(
            load_model(path),
            prompt,
            num_tokens,
            budget=10**6 if is_lossless else setting.budget,
            buffer=setting.buffer,
            window=setting.window,
            score=setting.score,
            block=setting.block,
            windows=[SLIDING_WINDOW if kind == SLIDING else None for kind in layer_types],
        )
        assert len(expected.compactions) == (0 if is_lossless else 3)
        differs = [i for i in range(num_tokens) if output.output_ids[i] != expected.output_ids[i]]
        assert not differs, f"token {differs[0]} differs, where the oracle's gap is {expected.logit_gaps[differs[0]]}"
    assert len(result.probe.compactions) == 3 * len(prompts)


@pytest.mark.parametrize("block", [None, 16])
def test_what_would_keep_fewer_than_the_window_is_refused(block):
    budget, window = (40, SLIDING_WINDOW - 1) if block else (SLIDING_WINDOW - 1, 8)
    flags = Setting(budget=budget, buffer=32, window=window, policy="snapkv", block=block).flags
    with pytest.raises(LauncherRefused) as caught:
        run_scheduler(["--model-path", str(tiny_model_path("olmo3")), *flags], [])
    flag = "--kv-window" if block else "--kv-budget"
    assert f"attend to the latest {SLIDING_WINDOW} tokens: set {flag} to at least that" in caught.value.log


def test_a_request_that_would_keep_fewer_is_refused_alone():
    requests = [greedy(six_prompts()[4], 80) for _ in range(2)]
    requests[0].sampling_params["custom_params"] = {"kv_budget": SLIDING_WINDOW - 1}
    flags = ["--model-path", str(tiny_model_path("olmo3")), *Setting(budget=37, buffer=23).flags]
    result = run_scheduler(flags, requests)
    end = result.outputs[0].finish_reason
    assert end["type"] == "abort" and end["status_code"] == 400
    assert f"is not an integer of at least {SLIDING_WINDOW} (some of the model's layers attend" in end["message"]
    assert len(result.outputs[1].output_ids) == 80
