"""The server answers as a dense cache that evicts per layer and head at the same steps, whatever else is on."""

import itertools
import os

import pytest

from devtools.tiny_models import TINY_MODELS, tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, oracle, six_prompts
from tests.support.harness.scheduler import run_scheduler

NUM_TOKENS = 140
# No multiple of any page size but 1, nor of each other.
SETTINGS = (Setting(budget=37, buffer=23), Setting(budget=43, buffer=19, window=5))

PAGE_SIZES = (1, 16, 64)
OVERLAP = ((), ("--disable-overlap-schedule",))
RADIX = ((), ("--disable-radix-cache",))
CHUNK_SIZE = 32
# Every combination of switches, the models dealt over them so that each meets every value of every switch.
SWITCHES = list(itertools.product(PAGE_SIZES, OVERLAP, RADIX, (False, True)))
CASES = [(TINY_MODELS[(i + i // 4) % 4], *switches) for i, switches in enumerate(SWITCHES)]
if os.environ.get("RKV_TEST_FULL_MATRIX"):
    CASES = [(model, *switches) for model in TINY_MODELS for switches in SWITCHES]


def name_of(case: tuple) -> str:
    model, page_size, overlap, radix, chunk = case
    words = [model, f"page{page_size}", "no-overlap" * bool(overlap), "no-radix" * bool(radix), "chunks" * chunk]
    return "-".join(word for word in words if word)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tokens_equal_the_dense_oracle_alone_and_in_company(case):
    model_name, page_size, overlap, radix, chunk = case
    model = tiny_model_path(model_name)
    setting = SETTINGS[SWITCHES.index(case[1:]) // 2 % 2]
    prompts = six_prompts()
    requests = [greedy(prompts[2], NUM_TOKENS)]
    requests += [greedy(prompt, NUM_TOKENS, when_idle=i == 0) for i, prompt in enumerate(prompts)]
    flags = ["--model-path", str(model), "--page-size", str(page_size), *overlap, *radix, *setting.flags]
    if chunk:
        # SGLang wants whole pages in a chunk.
        flags += ["--chunked-prefill-size", str(max(CHUNK_SIZE, page_size))]
    env = {"RKV_PROBE_MAX_PRIVATE": str(setting.budget + setting.buffer)}

    result = run_scheduler(flags, requests, env=env)

    result.assert_clean()
    for i, prompt in enumerate([prompts[2], *prompts]):
        expected = oracle(model, prompt, NUM_TOKENS, setting, result.outputs[i].output_ids)
        assert len(expected.compactions) >= 4
        assert_same_tokens(result.outputs[i].output_ids, expected, f"request {i}")
    assert len(result.probe.compactions) == sum(
        len(oracle(model, prompt, NUM_TOKENS, setting).compactions) for prompt in [prompts[2], *prompts]
    )
    if not radix:
        # The repeated prompt is found again up to its last whole page, and the shared prefix by the other three.
        last_page = (len(prompts[2]) - 1) // page_size * page_size
        assert result.outputs[3].cached_tokens == last_page
