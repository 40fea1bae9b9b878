"""Blocks that leave the map for all layers and heads at once: the server answers as a dense cache without them.

In every run a bitwise copy of the pool sees that no slot that is kept changes its contents.
"""

import itertools
import os

import pytest

from devtools.tiny_models import TINY_MODELS, tiny_model_path
from rkv_sglang.cache.trace import kept_positions
from rkv_sglang.policies import POLICIES, granularities_of
from tests.e2e.workload import (
    Setting,
    assert_same_tokens,
    greedy,
    oracle,
    outputs_at_restores,
    outputs_at_retractions,
    retracting,
    six_prompts,
)
from tests.support.harness.scheduler import Request, RunResult, rid_of, run_scheduler
from tests.support.oracle.dense import dense_generate

MODELS = ("llama-gqa", "qwen3")
CHUNK_SIZE = 32
NO_OVERLAP, NO_RADIX = "--disable-overlap-schedule", "--disable-radix-cache"
BY_KEYS = ("rkv", "snapkv", "h2o", "keydiff")
OTHERS = ("streaming_llm", "random", *BY_KEYS)
FULL_MATRIX = bool(os.environ.get("RKV_TEST_FULL_MATRIX"))
# Policy, model, page size, then as numbers: no overlap, no radix cache, chunks. Every two values meet.
CASES = [
    ("random_attention", "llama-gqa", 1, 1, 0, 0),
    ("random_attention", "llama-gqa", 16, 1, 1, 1),
    ("random_attention", "llama-gqa", 64, 0, 0, 1),
    ("random_attention", "qwen3", 1, 0, 1, 1),
    ("random_attention", "qwen3", 16, 0, 0, 0),
    ("random_attention", "qwen3", 64, 1, 1, 0),
]
# The same of all other policies together; the two of each differ in everything.
OTHER_CASES = [
    ("streaming_llm", "llama-gqa", 1, 0, 0, 0),
    ("streaming_llm", "qwen3", 16, 1, 1, 1),
    ("random", "llama-gqa", 16, 0, 1, 1),
    ("random", "qwen3", 64, 1, 0, 0),
    ("rkv", "llama-gqa", 64, 1, 0, 1),
    ("rkv", "qwen3", 1, 0, 1, 0),
    ("snapkv", "llama-gqa", 64, 0, 1, 0),
    ("snapkv", "qwen3", 16, 1, 0, 1),
    ("h2o", "llama-gqa", 16, 1, 1, 0),
    ("h2o", "qwen3", 1, 0, 0, 1),
    ("keydiff", "llama-gqa", 1, 1, 1, 1),
    ("keydiff", "qwen3", 64, 0, 0, 0),
]
# What an answer of so many tokens comes out of.
LONG = [(1000, 300, Setting(budget=128, buffer=32, window=64, policy="random_attention", block=16))]
if FULL_MATRIX:
    SERVERS = ((1, 16, 64), (0, 1), (0, 1), (0, 1))
    CASES = [
        *itertools.product(("random_attention", *OTHERS), MODELS, *SERVERS),
        *itertools.product(("random_attention",), [name for name in TINY_MODELS if name not in MODELS], *SERVERS),
    ]
    OTHER_CASES = []
    LONG.append((2000, 600, Setting(budget=256, buffer=64, window=64, policy="random_attention", block=16)))


def setting_of(policy: str, page_size: int = 1) -> Setting:
    """Two blocks of 16 go at a time, or one of a larger page; of two at least that might go, wherever a prompt ends."""
    block = max(16, page_size)
    sizes = {"budget": 75, "buffer": 32} if block == 16 else {"budget": 11 + 2 * block, "buffer": block}
    return Setting(**sizes, window=9, policy=policy, block=block)


def enough_tokens(setting: Setting) -> int:
    """Return how many tokens take four compactions."""
    return setting.budget + 4 * setting.buffer + 5


def run(model: str, setting: Setting, requests: list[Request], *flags: str, **env: str) -> RunResult:
    """Run requests under a setting; nothing may be moved, and nobody hold more than budget and buffer."""
    bounds = {"RKV_PROBE_MAX_PRIVATE": str(setting.budget + setting.buffer), "RKV_PROBE_MOVES_NOTHING": "1"}
    result = run_scheduler(
        ["--model-path", str(tiny_model_path(model)), *setting.flags, *flags], requests, env=bounds | env
    )
    result.assert_clean()
    return result


def assert_as_the_oracle(
    result: RunResult, model: str, setting: Setting, prompts: list[tuple[int, ...]], num_tokens: int
) -> None:
    """Assert equal tokens and as many compactions as the oracle's, at least four of each request."""
    num_compactions = 0
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        expected = oracle(tiny_model_path(model), prompt, num_tokens, setting, output.output_ids)
        assert len(expected.compactions) >= 4
        num_compactions += len(expected.compactions)
        assert_same_tokens(output.output_ids, expected, f"request {i}")
    assert len(result.probe.compactions) == num_compactions


@pytest.mark.parametrize("case", [*CASES, *OTHER_CASES], ids=lambda case: "-".join(map(str, case)))
def test_tokens_equal_the_dense_oracle_alone_and_in_company(case):
    policy, model, page_size, no_overlap, no_radix, chunks = case
    setting = setting_of(policy, page_size)
    num_tokens = enough_tokens(setting)
    company = six_prompts()[2:5] if case in OTHER_CASES else six_prompts()
    prompts = [six_prompts()[2], *company]
    requests = [greedy(prompt, num_tokens, when_idle=i == 1) for i, prompt in enumerate(prompts)]
    flags = ["--page-size", str(page_size), *[NO_OVERLAP] * no_overlap, *[NO_RADIX] * no_radix]
    if chunks:
        flags += ["--chunked-prefill-size", str(max(CHUNK_SIZE, page_size))]
    result = run(model, setting, requests, *flags)
    assert_as_the_oracle(result, model, setting, prompts, num_tokens)
    # Nothing is recorded while it decodes, unless keys are scored.
    assert ("side buffers 0.0 MiB (0 query rows)" in result.log) == (policy not in BY_KEYS)
    if not no_radix:
        # The repeated prompt is found again up to its last whole page.
        again = result.outputs[1 + company.index(prompts[0])]
        assert again.cached_tokens == (len(prompts[0]) - 1) // page_size * page_size


def test_every_policy_that_can_is_tried_and_every_two_values_of_a_server_meet():
    assert {policy for policy, *_ in [*CASES, *OTHER_CASES]} == {
        name for name, policy in POLICIES.items() if "request" in granularities_of(policy)
    }
    for cases in filter(None, (CASES, OTHER_CASES)):
        _, *columns = zip(*cases, strict=True)
        assert [len(set(column)) for column in columns[1:]] == [3, 2, 2, 2]
        for first, second in itertools.combinations(columns, 2):
            assert len(set(zip(first, second, strict=True))) == len(set(first)) * len(set(second))
    for one, other in zip(OTHER_CASES[::2], OTHER_CASES[1::2], strict=True):
        assert [a == b for a, b in zip(one, other, strict=True)] == [True, *[False] * 5]


def test_settings_of_requests_and_head_starts_decide_with_their_tokens():
    server = Setting(budget=75, buffer=64, window=9, policy="random_attention", stagger=True, block=16)
    asked = [server, Setting(24, 16, 9, True, "random_attention", 16), Setting(40, 96, 9, True, "random_attention", 16)]
    prompts = six_prompts()[:3]
    requests = [greedy(prompt, 260) for prompt in prompts]
    for request, setting in zip(requests, asked, strict=True):
        own = {"kv_budget": setting.budget, "kv_buffer": setting.buffer, "kv_trace": True}
        request.sampling_params["custom_params"] = own
    requests.append(greedy(prompts[0], 60))
    requests[-1].sampling_params["custom_params"] = {"kv_policy": "none"}
    result = run("qwen3", server, requests, "--kv-trace")
    for i, (prompt, setting) in enumerate(zip(prompts, asked, strict=True)):
        found = result.outputs[i].output_ids
        expected = oracle(tiny_model_path("qwen3"), prompt, 260, setting, found)
        assert_same_tokens(found, expected, f"request {i} under {setting}")
        # What was kept is told once for all layers and heads.
        trace = result.outputs[i].info["kv_trace"]
        held = kept_positions(trace["compactions"], trace["num_layers"], trace["num_kv_heads"], 260)
        for mask, compaction in zip(held, expected.compactions, strict=True):
            kept = compaction.kept_positions[:, :, len(prompt) :] - len(prompt)
            assert mask.shape[:2] == (1, 1) and (kept == kept[0, 0]).all()
            assert mask[0, 0].nonzero()[0].tolist() == kept[0, 0].tolist()
    assert "kv_trace" not in result.outputs[3].info
    whole = oracle(tiny_model_path("qwen3"), prompts[0], 60, server)
    assert not whole.compactions and result.outputs[3].output_ids == whole.output_ids


# Slots in which three requests just run, so that those retracted have seen more than it holds; or plenty of them.
RETRACTIONS = [("random_attention", 1, 182, 157), ("h2o", 16, 208, 211), ("random", 1, 4096, 61)]


@pytest.mark.parametrize(("policy", "page_size", "pool", "interval"), RETRACTIONS, ids=[row[0] for row in RETRACTIONS])
def test_retracted_requests_are_computed_again_or_come_back_with_what_they_kept(policy, page_size, pool, interval):
    model, setting = tiny_model_path("llama-gqa"), Setting(budget=24, buffer=16, policy=policy, block=16)
    prompts = [prompt[:length] for prompt, length in zip(six_prompts()[3:], (30, 5, 22), strict=True)]
    num_tokens = 2 * interval + 30
    result = run_scheduler(
        ["--model-path", str(model), *setting.flags, "--max-total-tokens", str(pool), "--page-size", str(page_size)],
        [greedy(prompt, num_tokens) for prompt in prompts],
        env={**retracting(interval), "RKV_PROBE_MOVES_NOTHING": "1"},
    )
    result.assert_clean()
    again, back = ([of(result, rid_of(i)) for i in range(3)] for of in (outputs_at_retractions, outputs_at_restores))
    assert any(again if pool == 4096 else back)
    for i, prompt in enumerate(prompts):
        expected = dense_generate(
            model,
            prompt,
            num_tokens,
            budget=setting.budget,
            buffer=setting.buffer,
            score=setting.score,
            block=setting.block,
            recompute_at=again[i],
            restore_at=back[i],
            restored_in_flight=True,
            guessed_output_ids=result.outputs[i].output_ids,
        )
        assert_same_tokens(result.outputs[i].output_ids, expected, f"request {i}, again {again[i]}, back {back[i]}")


def test_the_copy_of_the_pool_sees_what_moving_changes():
    flags = ["--model-path", str(tiny_model_path("llama-gqa")), *Setting(budget=24, buffer=16).flags]
    result = run_scheduler(flags, [greedy(six_prompts()[4], 50)], env={"RKV_PROBE_MOVES_NOTHING": "1"})
    assert [violation["violation"] for violation in result.probe.violations] == ["contents"]


def test_requests_decode_inside_prefill_batches_where_nothing_is_recorded():
    """Prompts come in while others decode, in chunks of a page and room for those; SGLang counts them as part of it."""
    setting = setting_of("random_attention", 16)
    num_tokens, prompts = enough_tokens(setting), six_prompts()
    requests = [greedy(prompt, num_tokens, at_step=27 * i) for i, prompt in enumerate(prompts)]
    flags = ["--page-size", "16", "--enable-mixed-chunk", "--chunked-prefill-size", "32"]
    result = run("qwen3", setting, requests, *flags)
    mixed = [step for step in result.probe.steps if step["mode"] == "MIXED"]
    assert len(mixed) > 5 and any(row["compactions"] for step in mixed for row in step["running"])
    assert_as_the_oracle(result, "qwen3", setting, list(prompts), num_tokens)


def test_two_ranks_choose_the_same_blocks_by_the_scores_of_all_heads():
    setting = setting_of("rkv")
    num_tokens = enough_tokens(setting)
    prompts = list(six_prompts()[2:4])
    requests = [greedy(prompt, num_tokens) for prompt in prompts]
    result = run("llama-gqa", setting, requests, "--tp", "2", SGLANG_CPU_OMP_THREADS_BIND="0|1")
    assert_as_the_oracle(result, "llama-gqa", setting, prompts, num_tokens)


@pytest.mark.parametrize(("num_tokens", "num_slots", "setting"), LONG, ids=["a thousand", "two thousand"][: len(LONG)])
def test_three_times_as_many_tokens_come_out_as_there_are_slots(num_tokens, num_slots, setting):
    prompt = six_prompts()[1]
    result = run("llama-gqa", setting, [greedy(prompt, num_tokens)], "--max-total-tokens", str(num_slots))
    found = result.outputs[0].output_ids
    expected = oracle(tiny_model_path("llama-gqa"), prompt, num_tokens, setting, found)
    assert len(found) == num_tokens and len(expected.compactions) > 20
    assert_same_tokens(found, expected, "the answer")
