"""A document compressed once under a name, and requests that go on from it."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from tests.e2e.named_prefixes import (
    BUDGET,
    CREATE,
    FLAGS,
    LENGTH,
    MODEL,
    NAME,
    NUM_TOKENS,
    SHARED_LEN,
    answer_behind,
    asking,
    refusal_of,
    texts,
)
from tests.e2e.workload import (
    Setting,
    assert_same_tokens,
    greedy,
    outputs_at_restores,
    outputs_at_retractions,
    random_ids,
    retracting,
)
from tests.support.harness.gate import Control
from tests.support.harness.scheduler import rid_of, run_scheduler
from tests.support.oracle.dense import DenseResult, Prefix, dense_generate, dense_prefix

LOCKED = {"RKV_PROBE_MAX_LOCKED": str(BUDGET)}


@cache
def prefix_of(policy: str) -> Prefix:
    document, task, _ = texts()
    return dense_prefix(MODEL, document, task, BUDGET, score=Setting(24, 16, policy=policy).score)


def expected_of(policy: str, prompt: list[int], guess: list[int], **options: Any) -> DenseResult:
    return answer_behind(prefix_of(policy), Setting(24, 16, policy=policy), prompt, guess, **options)


@pytest.mark.parametrize(
    "policy, page_size, extra",
    [
        ("rkv", 1, []),
        ("snapkv", 16, ["--chunked-prefill-size", "32"]),
        ("streaming_llm", 1, ["--disable-overlap-schedule", "--chunked-prefill-size", "32"]),
        ("random_attention", 16, ["--disable-overlap-schedule"]),
    ],
)
def test_requests_that_share_a_named_prefix_answer_as_the_oracle_says(policy, page_size, extra):
    setting, (document, task, prompts) = Setting(budget=24, buffer=16, policy=policy), texts()
    whole = [*document, *task]
    requests = [
        # All of it is in the cache already, but the task is computed.
        greedy(whole, 2),
        # It need not generate a token.
        asking(CREATE, whole, int(page_size == 1), when_idle=True),
        # Four begin alike, and all but the first of these find that in the tree.
        *[asking(NAME, prompt, NUM_TOKENS, when_idle=i < 2) for i, prompt in enumerate(prompts)],
        # The same again, of which the tree has all but the last token; and the document as others know it.
        asking(NAME, prompts[2], NUM_TOKENS, when_idle=True),
        greedy(whole, 8),
        asking({"delete": NAME}, [5], when_idle=True),
    ]
    flags = [*FLAGS, "--page-size", str(page_size), *setting.flags, *extra]
    result = run_scheduler(flags, requests, env={"RKV_SGLANG_VERIFY": "1", **LOCKED})
    result.assert_clean()
    info = {"name": NAME, "length": LENGTH, "budget": BUDGET, "judge": "policy"}
    assert [output.info.get("kv_prefix") for output in result.outputs] == [
        *(None, info),
        *[info] * 7,
        *(None, {"deleted": NAME}),
    ]
    for i, request in enumerate(requests[2:9], 2):
        output = result.outputs[i]
        assert_same_tokens(output.output_ids, expected_of(policy, request.input_ids, output.output_ids), f"request {i}")
        assert output.info["kv_compactions"] == 2
        assert output.info["kv_prompt_tokens"] == BUDGET + len(request.input_ids)
    assert result.outputs[1].cached_tokens == LENGTH // page_size * page_size
    shared = (BUDGET + SHARED_LEN) // page_size * page_size
    assert [output.cached_tokens >= shared for output in result.outputs[2:6]] == [False, True, True, True]
    last = result.outputs[8]
    assert last.cached_tokens >= BUDGET + len(prompts[2]) - page_size
    assert result.outputs[9].cached_tokens >= len(whole) - page_size
    # Held for as long as it is there, and given back.
    assert [idle["protected"] for idle in result.probe.idles][-6:] == [0, *[BUDGET] * 4, 0]


# What is asked, and what the line says of it; the prompts are 111 tokens.
BAD: list[tuple[Any, str]] = [
    (None, "kv_prefix None is neither the name of a prefix nor an object"),
    (5, "kv_prefix 5 is neither"),
    ([NAME], "is neither the name"),
    ("", "kv_prefix '' is no name"),
    ("two\nlines", "is no name: set it to a text of 1 to 100 characters"),
    ("x" * 101, "is no name"),
    ({}, r"kv_prefix \{\} is none of the objects that there are: set it to \{'create': NAME, "),
    ({"create": "b"}, "is none of the objects"),
    ({"length": 90, "budget": 32}, "is none of the objects"),
    ({**CREATE, "policy": "rkv"}, "is none of the objects"),
    ({"delete": "b", "list": True}, "is none of the objects"),
    ({"list": False}, "kv_prefix list False is not true"),
    ({"delete": 5}, "kv_prefix 5 is no name"),
    ({"delete": ""}, "kv_prefix '' is no name"),
    ({**CREATE, "create": ["b"]}, "is no name"),
    ({**CREATE, "create": ""}, "kv_prefix '' is no name"),
    ({**CREATE, "create": "x" * 101}, "is no name"),
    ({**CREATE, "create": "b", "length": 0}, "kv_prefix length 0 is not an integer of at least 1"),
    ({**CREATE, "create": "b", "length": True}, "kv_prefix length True is not an integer"),
    ({**CREATE, "create": "b", "length": "90"}, "kv_prefix length '90' is not an integer"),
    ({**CREATE, "create": "b", "length": None}, "kv_prefix length None is not an integer"),
    ({**CREATE, "create": "b", "length": 90.0}, "kv_prefix length 90.0 is not an integer"),
    ({**CREATE, "create": "b", "budget": 32.0}, "kv_prefix budget 32.0 is not an integer"),
    ({**CREATE, "create": "b", "budget": "32"}, "kv_prefix budget '32' is not an integer"),
    ({**CREATE, "create": "b", "budget": True}, "kv_prefix budget True is not an integer"),
    ({**CREATE, "create": "b", "budget": None}, "kv_prefix budget None is not an integer"),
    ({**CREATE, "create": "b", "budget": 0}, "kv_prefix budget 0 is not an integer of at least 1"),
    ({**CREATE, "create": "b", "length": 104}, "length 104 leaves 7 of the 111 tokens .* set it to 103 or less"),
    ({**CREATE, "create": "b", "length": 10**40}, "leaves 0 of the 111 tokens"),
    ({**CREATE, "create": "b", "judge": "me"}, "kv_prefix judge 'me' is none of 'policy', 'task', 'repeat': set it to"),
    ({**CREATE, "create": "b", "judge": ["task"]}, r"kv_prefix judge \['task'\] is none of"),
    (
        {**CREATE, "create": "b", "judge": "task", "length": 111},
        "0 of the 111 .* tokens judge the .* set it to 110",
    ),
    (
        {**CREATE, "create": "b", "judge": "repeat"},
        "leaves 21 of the 111 tokens that came for the document again",
    ),
    (
        {"create": "b", "length": 50, "budget": 32, "judge": "repeat"},
        r"the last 50 tokens, and of these token 0 is \d+, in the document \d+: send the document, an instruction to",
    ),
    ({**CREATE, "create": "b", "budget": 12}, "budget 12 leaves nothing to choose: the first 4 .* set it to 16 or"),
    ({**CREATE, "create": "b", "budget": 33}, r"no multiple of the page of 16 .* set it to 48"),
    ({**CREATE, "create": "b", "budget": 96}, "budget 96 is not less than the length of 90"),
    (CREATE, f"kv_prefix '{NAME}' is there already: take another name, or delete it first"),
    ("b", "kv_prefix 'b' is unknown here: create it first"),
    ({"delete": "b"}, "kv_prefix 'b' is unknown here"),
    # The pool has 192 slots, of which 32 are taken.
    (
        {"create": "b", "length": 101, "budget": 96},
        "does not fit the KV pool of 192 .* prefixes take 128, and this requ",
    ),
]
# What does not go together with a prefix that there is.
BESIDE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"kv_prefix": {**CREATE, "create": "b"}, "kv_policy": "none"}, {}, "compressed by the server's policy"),
    ({"kv_prefix": {**CREATE, "create": "b"}, "kv_prompt_budget": 40}, {}, "does not go with kv_prompt_budget"),
    ({"kv_prefix": NAME, "kv_prompt_len": 3}, {}, "kv_prefix does not go with kv_prompt_len: leave one"),
    ({"kv_prefix": NAME}, {"extra": {"extra_key": "mine"}}, "does not go with extra_key or cache_salt"),
    ({"kv_prefix": NAME}, {"extra": {"cache_salt": "mine"}}, "does not go with extra_key or cache_salt"),
    ({"kv_prefix": NAME}, {"return_logprob": True, "logprob_start_len": 0}, "gives no log-probabilities of the prompt"),
    ({"kv_prefix": {**CREATE, "create": "b"}}, {"extra": {"lora_id": "a"}}, "does not go with LoRA adapters"),
]


def test_whatever_is_wrong_is_answered_in_one_line_and_changes_nothing():
    document, task, prompts = texts()
    whole = [*document, *task]
    bad = [asking(value, whole) for value, _ in BAD]
    for custom, fields, _ in BESIDE:
        bad.append(greedy(whole if "create" in custom["kv_prefix"] else prompts[0], 1, **fields))
        bad[-1].sampling_params["custom_params"] = custom
    # Too long for the context of 170, once 90 are in front of it; and for what is left of the pool, whole or in part.
    bad.append(asking(NAME, whole[:78]))
    without = [greedy((whole * 2)[:length], 140) for length in (160, 100)]
    for request in without:
        request.sampling_params["custom_params"] = {"kv_policy": "none"}
    bad += without
    expected = [*(line for _, line in BAD), *(line for _, _, line in BESIDE)]
    expected += ["are more than the context of 170 tokens holds"]
    expected += ["^The request needs 177 tokens of the KV pool of 192, and named prefixes hold 32 of them"]
    requests = [
        asking(CREATE, whole),
        *[asking(CREATE, whole), asking(NAME, prompts[0])],
        asking({"list": True}, [5], when_idle=True),
        *[request if i else asking(BAD[0][0], whole, when_idle=True) for i, request in enumerate(bad)],
        asking({"list": True}, [5], when_idle=True),
        asking(NAME, prompts[0], 20),
        # Another could be made, but not while this is here, which needs what is left.
        greedy(whole[:100], 20, when_idle=True),
        asking({**CREATE, "create": "b", "budget": 48}, whole),
        asking({"delete": NAME}, [5], when_idle=True),
        asking(NAME, prompts[0]),
        asking({"list": True}, [5]),
    ]
    flags = [*FLAGS, "--page-size", "16", "--max-total-tokens", "192", "--context-length", "170"]
    setting = Setting(budget=24, buffer=16)
    result = run_scheduler([*flags, *setting.flags], requests, env=LOCKED)
    result.assert_clean()
    info = {"name": NAME, "length": LENGTH, "budget": BUDGET, "judge": "policy"}
    assert result.outputs[0].info["kv_prefix"] == info
    # While it is made, the name is taken and there is nothing to use.
    assert re.search("is being made: take another name", refusal_of(result.outputs[1]))
    assert re.search("is being made: ask again once", refusal_of(result.outputs[2]))
    assert result.outputs[3].info["kv_prefix"] == [info]
    for output, line in zip(result.outputs[4:], expected, strict=False):
        assert re.search(line, refusal_of(output)), (line, output.finish_reason)
    limited, listed, used, _, refused, deleted, unknown, empty = result.outputs[-8:]
    # Its prompt and 20 tokens, in whole pages.
    assert re.search("prefixes take 80, and request r0.* needs 128; ", refusal_of(refused))
    # Of the pool's 192 slots the prefix has 32, its prompt 112, and SGLang leaves a page and one.
    assert len(limited.output_ids) == 31
    assert listed.info["kv_prefix"] == [info]
    assert_same_tokens(used.output_ids, expected_of("rkv", prompts[0], used.output_ids), "after all these")
    assert deleted.info["kv_prefix"] == {"deleted": NAME} and empty.info["kv_prefix"] == []
    assert "is unknown here" in refusal_of(unknown)


def test_many_requests_hold_the_prefix_once_and_deleting_it_gives_all_back(rng):
    task, length, kept = texts()[1], 4000, 400
    document = random_ids(rng, length)
    # Before them some more, of which the last have long prompts that are compacted: over a hundred, watched bit by bit.
    others = [asking(NAME, [100 + i, 5], 3, when_idle=i == 0) for i in range(16)]
    others += [greedy([*document[:30], 120 + i], 12) for i in range(24)]
    for request in others[16:]:
        request.sampling_params["custom_params"] = {"kv_prompt_budget": 14}
    # None begins as another does, so none shares a slot of its own.
    prompts = [[3 + i, *random_ids(rng, 4 + i)] for i in range(64)]
    requests = [
        asking({"create": NAME, "length": length, "budget": kept}, [*document, *task]),
        *others,
        *[asking(NAME, prompt, 50, when_idle=i == 0) for i, prompt in enumerate(prompts)],
        # While all of them run, and one waits.
        asking(NAME, [5], at_step=49),
        asking({"delete": NAME}, [5], 50, at_step=50),
        # As those know it that ask for no prefix.
        greedy([*document, *task], 2, when_idle=True),
    ]
    first = 1 + len(others)
    # Of 4,000 tokens R-KV's scores lie so near each other that the order of summation decides at the cut.
    setting = Setting(budget=24, buffer=16, policy="random_attention")
    flags = [*FLAGS, *setting.flags, "--max-running-requests", "64", "--max-total-tokens", "12000"]
    flags += ["--context-length", "4500"]
    result = run_scheduler(flags, requests, env={"RKV_PROBE_MAX_LOCKED": str(kept)})
    result.assert_clean()
    assert [output.info["kv_compactions"] for output in result.outputs[17:first]] == [1] * 24
    own = {rid_of(i) for i in range(first, first + 64)}
    together = [step for step in result.probe.steps if {entry["rid"] for entry in step["running"]} == own]
    assert len(together) > 30
    for step in together:
        used = step["total"] - step["available"] - step["evictable"]
        assert used == kept + sum(entry["allocated_len"] - kept for entry in step["running"])
        for entry in step["running"]:
            prompt = prompts[int(entry["rid"][1:]) - first]
            assert 0 < entry["allocated_len"] - kept <= len(prompt) + setting.budget + setting.buffer + 1
    assert "was deleted while the request waited" in refusal_of(result.outputs[first + 64])
    assert result.probe.idles[-1]["protected"] == 0
    assert result.outputs[-1].cached_tokens >= length
    prefix = dense_prefix(MODEL, document, task, kept, score=setting.score)
    for i in rng.sample(range(64), 12):
        prompt, output = prompts[i], result.outputs[first + i]
        expected = answer_behind(prefix, setting, prompt, output.output_ids)
        assert_same_tokens(output.output_ids, expected, f"request {i}")


def test_who_makes_a_prefix_waits_for_its_slots_and_nobody_is_preempted(rng):
    document, task, _ = texts()
    # 20 + 40 slots, and 111 + 40 + 32: they do not fit together, though all would but for those of the prefix.
    requests = [
        greedy(random_ids(rng, 20), 70),
        asking(CREATE, [*document, *task], 60),
        asking({"delete": NAME}, [5], when_idle=True),
    ]
    flags = [*FLAGS, "--max-total-tokens", "230", *Setting(24, 16).flags]
    result = run_scheduler(flags, requests, env=LOCKED)
    result.assert_clean()
    assert result.probe.retractions == 0
    assert max(len(step["running"]) for step in result.probe.steps) == 1
    assert [len(output.output_ids) for output in result.outputs] == [70, 60, 1]


def test_whether_a_prompt_is_compacted_is_decided_once(rng):
    prompt, setting = random_ids(rng, 50), Setting(budget=12, buffer=8, window=4)
    request = greedy(prompt, 50, at_step=100)
    request.sampling_params["custom_params"] = {"kv_prompt_budget": 30}
    # It needs 100 slots of the 115, which there are not beside a prefix; that is deleted as it decodes.
    requests = [
        asking({"create": NAME, "length": 30, "budget": 20}, random_ids(rng, 36)),
        request,
        asking({"delete": NAME}, [5], at_step=108),
        greedy(prompt, 50, at_step=400),
    ]
    requests[3].sampling_params["custom_params"] = {"kv_prompt_budget": 30}
    flags = [*FLAGS, "--max-total-tokens", "115", *setting.flags]
    result = run_scheduler(flags, requests, env={"RKV_PROBE_MAX_LOCKED": "20"})
    result.assert_clean()
    assert result.outputs[2].info["kv_prefix"] == {"deleted": NAME}
    for i, prompt_budget in ((1, None), (3, 30)):
        output = result.outputs[i]
        sizes = {"budget": 12, "buffer": 8, "window": 4, "prompt_budget": prompt_budget}
        expected = dense_generate(MODEL, prompt, 50, **sizes, guessed_output_ids=output.output_ids)
        assert_same_tokens(output.output_ids, expected, f"prompt budget {prompt_budget}")
        assert output.info["kv_compactions"] == len(expected.compactions)


# Small enough that histories soon outgrow what the prefix leaves of the pool.
SMALL = Setting(budget=10, buffer=6, window=4)
SMALL_CREATE = {"create": NAME, "length": 40, "budget": 16}


def test_a_prefix_is_made_beside_an_answer_that_has_outgrown_the_pool(rng):
    requests = [
        greedy(random_ids(rng, 8), 160),
        asking(SMALL_CREATE, random_ids(rng, 49), at_step=130),
        asking({"delete": NAME}, [5], at_step=140),
    ]
    flags = [*FLAGS, "--max-total-tokens", "110", *SMALL.flags]
    result = run_scheduler(flags, requests, env={"RKV_PROBE_MAX_LOCKED": "16"})
    result.assert_clean()
    assert result.probe.retractions == 0 and len(result.outputs[0].output_ids) == 160
    assert [output.info["kv_prefix"] for output in result.outputs[1:]] == [
        {"name": NAME, "length": 40, "budget": 16, "judge": "policy"},
        {"deleted": NAME},
    ]


@pytest.mark.parametrize(
    "policy, page_size, extra, pool, interval",
    [
        # Two just run, and after 72 steps either has seen more than the pool holds.
        ("rkv", 1, [], 88, 72),
        ("snapkv", 4, ["--disable-overlap-schedule"], 88, 72),
        ("random_attention", 1, [], 88, 72),
        ("streaming_llm", 4, [], 88, 72),
        # They are computed again.
        ("rkv", 1, [], 300, 25),
    ],
)
def test_a_preempted_request_comes_back_behind_its_prefix(policy, page_size, extra, pool, interval, rng):
    setting = replace(SMALL, policy=policy)
    document, task = random_ids(rng, 40), random_ids(rng, 9)
    shared = random_ids(rng, 9)
    prompts = [[*shared, *random_ids(rng, 8)] for _ in range(2)]
    requests = [
        asking(SMALL_CREATE, [*document, *task]),
        *[asking(NAME, prompt, 160, when_idle=i == 0, return_logprob=True) for i, prompt in enumerate(prompts)],
        asking({"delete": NAME}, [5], when_idle=True),
    ]
    flags = [*FLAGS, "--max-total-tokens", str(pool), "--page-size", str(page_size), *extra, *setting.flags]
    env = {**retracting(interval), "RKV_SGLANG_VERIFY": "1", "RKV_PROBE_MAX_LOCKED": "16"}
    result = run_scheduler(flags, requests, env=env)
    result.assert_clean()
    prefix = dense_prefix(MODEL, document, task, 16, window=4, score=setting.score)
    restores = [outputs_at_restores(result, rid_of(i)) for i in (1, 2)]
    recomputed = [outputs_at_retractions(result, rid_of(i)) for i in (1, 2)]
    assert any(restores if pool < 100 else recomputed)
    for i, request in enumerate(requests[1:3], 1):
        output = result.outputs[i]
        comebacks = {"recompute_at": recomputed[i - 1], "restore_at": restores[i - 1], "restored_in_flight": not extra}
        expected = answer_behind(prefix, setting, request.input_ids, output.output_ids, **comebacks)
        expected = assert_same_tokens(output.output_ids, expected, f"request {i}, restored at {restores[i - 1]}")
        assert output.output_logprobs == pytest.approx(expected.logprobs, abs=1e-3)


@pytest.mark.parametrize(
    "control",
    [
        Control(300, "FlushCacheReqInput"),
        Control(300, "UpdateWeightFromDiskReqInput", {"model_path": str(MODEL), "flush_cache": False}),
    ],
    ids=["flush", "weights"],
)
def test_no_prefix_is_left_after_a_flush_or_new_weights(control):
    document, task, prompts = texts()
    requests = [
        asking(CREATE, [*document, *task]),
        asking(NAME, prompts[0], 30, when_idle=True),
        asking(NAME, prompts[0], 30, at_step=310),
        asking({"list": True}, [5], at_step=310),
        asking(CREATE, [*document, *task], at_step=311),
        asking(NAME, prompts[0], 30, at_step=330),
        asking({"delete": NAME}, [5], at_step=400),
    ]
    result = run_scheduler([*FLAGS, *Setting(24, 16).flags], requests, controls=[control], env=LOCKED)
    result.assert_clean()
    assert "is unknown here" in refusal_of(result.outputs[2])
    assert result.outputs[3].info["kv_prefix"] == []
    assert result.outputs[1].output_ids == result.outputs[5].output_ids
    assert result.probe.idles[-1]["protected"] == 0
