"""Blocks that leave the map for all layers and heads at once: the server answers as a dense cache without them."""

import itertools
import os

import pytest

from devtools.tiny_models import TINY_MODELS, tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, oracle, six_prompts
from tests.support.harness.scheduler import run_scheduler

BUDGET = 75
NUM_TOKENS = 230
CHUNK_SIZE = 32
PAGE_SIZES = (1, 16, 64)
OVERLAP = ((), ("--disable-overlap-schedule",))
RADIX = ((), ("--disable-radix-cache",))
SWITCHES = list(itertools.product(PAGE_SIZES, OVERLAP, RADIX, (False, True)))
# Every two values of two switches meet somewhere.
CASES = [(TINY_MODELS[i % 4], *SWITCHES[place]) for i, place in enumerate((0, 7, 10, 13, 17, 20, 22, 3))]
if os.environ.get("RKV_TEST_FULL_MATRIX"):
    CASES = [(model, *switches) for model in TINY_MODELS for switches in SWITCHES]


def setting_of(policy: str, page_size: int) -> Setting:
    block = max(16, page_size)
    # Two blocks go at a time, and one where a page is large.
    return Setting(budget=BUDGET, buffer=32 if block == 16 else block, window=9, policy=policy, block=block)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_equal_the_dense_oracle_alone_and_in_company(case):
    model_name, page_size, overlap, radix, chunk = case
    model, setting, prompts = tiny_model_path(model_name), setting_of("random_attention", page_size), six_prompts()
    requests = [greedy(prompts[2], NUM_TOKENS)]
    requests += [greedy(prompt, NUM_TOKENS, when_idle=i == 0) for i, prompt in enumerate(prompts)]
    flags = ["--model-path", str(model), "--page-size", str(page_size), *overlap, *radix, *setting.flags]
    if chunk:
        flags += ["--chunked-prefill-size", str(max(CHUNK_SIZE, page_size))]
    env = {"RKV_PROBE_MAX_PRIVATE": str(setting.budget + setting.buffer)}
    result = run_scheduler(flags, requests, env=env)
    result.assert_clean()
    expected = [oracle(model, prompt, NUM_TOKENS, setting) for prompt in (prompts[2], *prompts)]
    for i, (output, right) in enumerate(zip(result.outputs, expected, strict=True)):
        assert len(right.compactions) >= (4 if page_size < 64 else 2)
        assert_same_tokens(output.output_ids, right, f"request {i}")
    assert len(result.probe.compactions) == sum(len(right.compactions) for right in expected)
