"""The server answers as a dense cache that evicts per layer and head at the same steps, whatever else is on."""

import itertools

import pytest

from tests.e2e.workload import Setting, assert_same_tokens, greedy, oracle, six_prompts
from tests.harness.scheduler import run_scheduler
from tests.tiny_models import TINY_MODELS, tiny_model_path

NUM_TOKENS = 230
# No multiple of any page size but 1, nor of each other.
SETTINGS = (Setting(budget=37, buffer=23), Setting(budget=50, buffer=31, window=5))

PAGE_SIZES = (1, 16, 64)
OVERLAP = ((), ("--disable-overlap-schedule",))
RADIX = ((), ("--disable-radix-cache",))
CHUNKS = ((), ("--chunked-prefill-size", "32"))
# Chunks are whole pages, so SGLang refuses chunks of 32 with pages of 64.
ALL_SWITCHES = [
    (page_size, overlap, radix, chunk)
    for page_size, overlap, radix, chunk in itertools.product(PAGE_SIZES, OVERLAP, RADIX, CHUNKS)
]
# Every pair of values of two switches occurs in one of these.
PAIRWISE = [
    (1, OVERLAP[0], RADIX[0], CHUNKS[1]),
    (1, OVERLAP[1], RADIX[1], CHUNKS[0]),
    (16, OVERLAP[0], RADIX[1], CHUNKS[0]),
    (16, OVERLAP[1], RADIX[0], CHUNKS[1]),
    (64, OVERLAP[0], RADIX[0], CHUNKS[0]),
    (64, OVERLAP[1], RADIX[1], CHUNKS[1]),
]
CASES = [("llama-gqa", *switches) for switches in ALL_SWITCHES]
CASES += [(model, *switches) for model in TINY_MODELS if model != "llama-gqa" for switches in PAIRWISE]


def name_of(case: tuple) -> str:
    model, page_size, overlap, radix, chunk = case
    words = [model, f"page{page_size}", "no-overlap" * bool(overlap), "no-radix" * bool(radix), "chunk32" * bool(chunk)]
    return "-".join(word for word in words if word)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tokens_equal_the_dense_oracle_alone_and_in_company(case):
    model_name, page_size, overlap, radix, chunk = case
    model = tiny_model_path(model_name)
    setting = SETTINGS[CASES.index(case) % 2]
    prompts = six_prompts()
    requests = [greedy(prompts[2], NUM_TOKENS)]
    requests += [greedy(prompt, NUM_TOKENS, when_idle=i == 0) for i, prompt in enumerate(prompts)]
    flags = ["--model-path", str(model), "--page-size", str(page_size), *overlap, *radix, *chunk, *setting.flags]
    env = {"RKV_PROBE_MAX_PRIVATE": str(setting.budget + setting.buffer)}

    result = run_scheduler(flags, requests, env=env)

    result.assert_clean()
    for i, prompt in enumerate([prompts[2], *prompts]):
        expected = oracle(model, prompt, NUM_TOKENS, setting)
        assert len(expected.compactions) >= 4
        assert_same_tokens(result.outputs[i].output_ids, expected, f"request {i}")
    assert len(result.probe.compactions) == sum(
        len(oracle(model, prompt, NUM_TOKENS, setting).compactions) for prompt in [prompts[2], *prompts]
    )
    if not radix:
        # The repeated prompt is found again up to its last whole page, and the shared prefix by the other three.
        last_page = (len(prompts[2]) - 1) // page_size * page_size
        assert result.outputs[3].cached_tokens == last_page
