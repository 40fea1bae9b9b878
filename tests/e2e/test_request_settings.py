"""Requests with settings of their own share batches, each answers as if alone, and says how it was compressed."""

import json
import os
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from devtools.tiny_models import tiny_model_path
from rkv_sglang.cache.trace import kept_positions
from rkv_sglang.cli import main
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.prefixes.asked import asked_of
from rkv_sglang.integration.runtime.requests import config_for, marked_prompt_len, wants_trace
from rkv_sglang.view.trace import read_trace
from tests.e2e.workload import Setting, assert_same_tokens, greedy, oracle, six_prompts
from tests.garbage.neighbours import assert_one_line, mutated, with_wish
from tests.support.harness.scheduler import Request, run_scheduler
from tests.support.harness.server import Server
from tests.support.oracle.dense import dense_generate, dense_prefix

MODEL = tiny_model_path("llama-gqa")
FLAGS = ["--model-path", str(MODEL)]
SERVER = Setting(budget=32, buffer=16)
NUM_TOKENS = 160
# None asks for no policy.
ASKED: list[Setting | None] = [
    Setting(budget=32, buffer=16),
    None,
    Setting(budget=17, buffer=5),
    Setting(budget=64, buffer=16),
    Setting(budget=32, buffer=40),
    Setting(budget=90, buffer=1),
    None,
    Setting(budget=9, buffer=3),
]


def asking(prompt: tuple[int, ...], setting: Setting | None, num_tokens: int = NUM_TOKENS) -> Request:
    request = greedy(prompt, num_tokens)
    custom = {"kv_policy": "none"} if setting is None else {"kv_budget": setting.budget, "kv_buffer": setting.buffer}
    request.sampling_params["custom_params"] = custom
    return request


@pytest.mark.parametrize("page_size", [1, 16])
def test_eight_requests_with_eight_settings_answer_as_alone(page_size):
    prompts = [six_prompts()[i % 6] for i in range(8)]
    batch = [asking(prompt, setting) for prompt, setting in zip(prompts, ASKED, strict=True)]
    result = run_scheduler([*FLAGS, "--page-size", str(page_size), *SERVER.flags], batch)
    result.assert_clean()
    assert max(len(step["batch"]) for step in result.probe.steps) == 8
    for i, (prompt, setting, output) in enumerate(zip(prompts, ASKED, result.outputs, strict=True)):
        # A budget that is never reached is none.
        expected = oracle(MODEL, prompt, NUM_TOKENS, setting or Setting(budget=1000, buffer=1), output.output_ids)
        assert_same_tokens(output.output_ids, expected, f"request {i}, {setting}")


def test_small_budgets_never_run_out_of_query_rows():
    """There is a query row for every so many tokens of the server's own capacity; a smaller one is reserved as much."""
    prompts = six_prompts()
    batch = [asking(prompts[4], Setting(budget=9, buffer=1), 50) for _ in range(24)]
    batch += [asking(prompts[5], None, 60) for _ in range(4)]
    server = Setting(budget=100, buffer=20)
    result = run_scheduler([*FLAGS, "--max-total-tokens", "1024", *server.flags], batch)
    result.assert_clean()
    expected = oracle(MODEL, prompts[4], 50, Setting(budget=9, buffer=1), result.outputs[0].output_ids)
    for output in result.outputs[:24]:
        assert_same_tokens(output.output_ids, expected, "small budget")


def test_short_answers_under_small_budgets_never_run_out_of_query_rows():
    """They generate less than the server's own capacity, and are compacted all the same."""
    prompt, setting = six_prompts()[4], Setting(budget=9, buffer=1)
    batch = [asking(prompt, setting, 20) for _ in range(20)]
    server = Setting(budget=100, buffer=20)
    # Two rows; what a third request will really hold would still fit.
    result = run_scheduler([*FLAGS, "--max-total-tokens", "280", *server.flags], batch)
    result.assert_clean()
    for output in result.outputs:
        expected = oracle(MODEL, prompt, 20, setting, output.output_ids)
        assert_same_tokens(output.output_ids, expected, "small budget")


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_small_budget_is_served_where_the_servers_own_would_not_fit(page_size):
    """What is reserved for its query row must not be more than the pool has."""
    prompt, setting = six_prompts()[0], Setting(budget=20, buffer=5)
    flags = [*FLAGS, "--max-total-tokens", "256", "--page-size", str(page_size), *Setting(budget=200, buffer=100).flags]
    result = run_scheduler(flags, [asking(prompt, setting, 200) for _ in range(2)], timeout=90)
    result.assert_clean()
    for output in result.outputs:
        expected = oracle(MODEL, prompt, 200, setting, output.output_ids)
        assert_same_tokens(output.output_ids, expected, "small budget, small pool")


@pytest.mark.parametrize("page_size", [1, 16])
def test_half_without_a_policy_in_a_crowded_pool(page_size):
    prompts = six_prompts()
    batch = [asking(prompts[i % 6], SERVER if i % 2 else None, 60 + 6 * i) for i in range(16)]
    result = run_scheduler([*FLAGS, "--max-total-tokens", "1024", "--page-size", str(page_size), *SERVER.flags], batch)
    result.assert_clean()
    assert result.probe.retractions == 0
    for i, (request, output) in enumerate(zip(batch, result.outputs, strict=True)):
        setting = SERVER if i % 2 else Setting(budget=1000, buffer=1)
        found = output.output_ids
        expected = oracle(MODEL, prompts[i % 6], request.sampling_params["max_new_tokens"], setting, found)
        assert_same_tokens(found, expected, f"request {i}")


BAD = [
    ({"kv_policy": "snapkv"}, "kv_policy 'snapkv' is not what this server runs: leave it out, or set it to 'rkv' or"),
    ({"kv_policy": 3}, "kv_policy 3 is not what this server runs"),
    ({"kv_policy": "none", "kv_budget": 64}, "kv_policy 'none' has no kv_budget: leave one of them out"),
    ({"kv_budget": 8}, "kv_budget 8 is not an integer of at least 9 (the window of 8 is kept inside it)"),
    ({"kv_budget": 64.5}, "kv_budget 64.5 is not an integer"),
    ({"kv_budget": True}, "kv_budget True is not an integer"),
    ({"kv_buffer": 0}, "kv_buffer 0 is not an integer of at least 1: set it to 1 or more"),
    ({"kv_buffer": -3}, "kv_buffer -3 is not an integer"),
    ({"kv_trace": "yes"}, "kv_trace 'yes' is not a boolean: set it to true or leave it out"),
    ({"kv_prompt_len": 0}, "kv_prompt_len 0 is not an integer from 1 to the "),
    (
        {"kv_prompt_len": 75},
        "kv_prompt_len 75 is not an integer from 1 to the 74 tokens that came: set it to how many ",
    ),
    ({"kv_prompt_len": True}, "kv_prompt_len True is not an integer from 1 to the "),
    ({"kv_policy": "none", "kv_prompt_len": 5}, "kv_policy 'none' has no kv_prompt_len: leave one of them out"),
    (
        {"kv_prompt_budget": -1},
        "kv_prompt_budget -1 is neither 0 nor an integer of at least 13 (the first 4 and the last 8",
    ),
    ({"kv_prompt_budget": 12}, "kv_prompt_budget 12 is neither 0 nor an integer of at least 13"),
    ({"kv_prompt_budget": 40.0}, "kv_prompt_budget 40.0 is neither 0 nor an integer"),
    ({"kv_prompt_budget": False}, "kv_prompt_budget False is neither 0 nor an integer"),
    ({"kv_prompt_budget": "40"}, "kv_prompt_budget '40' is neither 0 nor an integer"),
    ({"kv_prompt_budget": None}, "kv_prompt_budget None is neither 0 nor an integer"),
    ({"kv_prompt_budget": 2**31}, "kv_prompt_budget 2147483648 is more than any context has: set it to 2147483647 or "),
    ({"kv_policy": "none", "kv_prompt_budget": 0}, "kv_policy 'none' has no kv_prompt_budget: leave one of them out"),
    ({"kv_bugdet": 64}, "custom_params has no 'kv_bugdet': it takes kv_policy, kv_budget, kv_buffer, kv_trace"),
    ({"kv": {"budget": 64}}, "custom_params has no 'kv': it takes"),
    ({"rkv_budget": 64}, "custom_params has no 'rkv_budget': it takes"),
    ({"kv_budget": 99_999}, "kv_budget 99999 and kv_buffer 16 together exceed this server's KV pool of 16384 tokens"),
]


def assert_as_the_oracle(found: list[int], prompt: list[int], setting: Setting, name: str) -> None:
    assert_same_tokens(found, oracle(MODEL, tuple(prompt), len(found), setting, found), name)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = [*SERVER.flags, "--enable-metrics", "--rkv-trace", "--decode-log-interval", "1"]
    # A named prefix is locked between two requests.
    with Server([*FLAGS, *flags], env={"RKV_PROBE_MAX_LOCKED": "32"}) as running:
        yield running


@pytest.mark.server
def test_a_bad_request_gets_400_and_one_line_and_the_server_serves_on(server):
    prompt = list(six_prompts()[0])
    params = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}
    for custom, message in BAD:
        for path, body in (
            ("/generate", {"input_ids": prompt, "sampling_params": {**params, "custom_params": custom}}),
            ("/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 100, "custom_params": custom}),
        ):
            answer = requests.post(server.url + path, json=body, timeout=60)
            assert answer.status_code == 400, (path, custom, answer.text)
            assert message in answer.text, (path, custom, answer.text)
    # The OpenAI-compatible endpoints refuse these by themselves.
    for custom in (["kv_policy", "none"], '{"kv_policy": "none"}', 5, True):
        ours = f"not a {type(custom).__name__}: write it as an object or leave it out"
        for path, body_of in PASSED_ON.items():
            answer = requests.post(server.url + path, json=body_of(custom), timeout=60)
            assert answer.status_code == 400, (path, custom, answer.text)
            message = ours if path.endswith("generate") else "'custom_params')"
            assert message in answer.text, (path, custom, answer.text)
    answer = server.generate(prompt, {**params, "custom_params": {"thinking_budget_of_others": 5}})
    assert_as_the_oracle(answer["output_ids"], prompt, SERVER, "after bad requests")
    asked = server.generate(prompt, {**params, "custom_params": {"kv_budget": 20, "kv_buffer": 7}})
    assert_as_the_oracle(asked["output_ids"], prompt, Setting(budget=20, buffer=7), "its own settings")
    server.assert_clean()


GARBAGE = {
    "kv_policy": "rkv",
    "kv_budget": 64,
    "kv_buffer": 16,
    "kv_trace": True,
    "kv_prompt_len": 1,
    "kv_prompt_budget": 40,
    "of_others": {"a": [1]},
}
IN_PARAMS = {"max_new_tokens": 2, "temperature": 0}
# Every endpoint that passes custom_params on, and the body around them.
PASSED_ON = {
    "/generate": lambda asked: {"text": "count on", "sampling_params": {**IN_PARAMS, "custom_params": asked}},
    "/vertex_generate": lambda asked: {
        "instances": [{"text": "count on"}],
        "parameters": {"sampling_params": {**IN_PARAMS, "custom_params": asked}},
    },
    "/v1/completions": lambda asked: {"model": "m", "prompt": "count", "max_tokens": 2, "custom_params": asked},
    "/v1/chat/completions": lambda asked: {
        "model": "m",
        "messages": [{"role": "user", "content": "count on"}],
        "max_tokens": 2,
        "custom_params": asked,
    },
    "/invocations": lambda asked: PASSED_ON["/v1/chat/completions"](asked),
}
NUM_CALLS = 1000 * len(PASSED_ON) if os.environ.get("RKV_TEST_FULL_MATRIX") else 400


def resident_bytes(server: Server) -> int:
    assert server._process is not None
    main = psutil.Process(server._process.pid)
    return sum(process.memory_info().rss for process in [main, *main.children(recursive=True)])


@pytest.mark.server
def test_garbage_gets_400_and_one_line_from_every_endpoint_and_nothing_stays_of_it(server, rng):
    """``RKV_TEST_FULL_MATRIX=1``: 1,000 calls of each endpoint."""
    config = PolicyConfig(budget=SERVER.budget, buffer=SERVER.buffer, trace=True)
    seen = []

    def send(number):
        path = list(PASSED_ON)[number % len(PASSED_ON)]
        own = random.Random(first + number)
        asked = mutated(own, with_wish(own, GARBAGE))
        try:
            config_for(asked, config, 16384)
            wants_trace(asked, config)
            # None of the prompts has so many tokens, and all have one.
            marked_prompt_len(asked, 100)
            is_right = not isinstance(asked, dict) or asked.get("kv_prompt_len", 1) == 1
            expected = {200} if is_right else {200, 400}
            wish = asked_of(asked)
            if wish is not None and wish.action != "list":
                # Nobody has made one, and no prompt has as many tokens as that takes.
                expected = {400}
        except ValueError:
            expected = {400}
        text = json.dumps(PASSED_ON[path](asked))
        # What is no JSON, or no text, is SGLang's to refuse; of other types than an object, too.
        if "NaN" in text or "Infinity" in text or "\\ud8" in text or not isinstance(asked, dict):
            expected = {200, 400}
        answer = requests.post(server.url + path, data=text, headers={"Content-Type": "application/json"}, timeout=120)
        seen.append((path, answer.status_code))
        assert answer.status_code in expected, (path, asked, answer.status_code, answer.text[:500])
        if answer.status_code == 400 and expected == {400}:
            error = answer.json()
            assert_one_line(error.get("message") or error["error"]["message"])

    with ThreadPoolExecutor(8) as pool:
        first = rng.randrange(2**31)
        list(pool.map(send, range(200)))
        before = resident_bytes(server)
        first += 200
        list(pool.map(send, range(NUM_CALLS)))
    assert resident_bytes(server) - before < 16 * 2**20
    assert {(path, status) for path in PASSED_ON for status in (200, 400)} <= set(seen)
    prompt = list(six_prompts()[0])
    answer = server.generate(prompt, {"max_new_tokens": 100, "ignore_eos": True})
    assert_as_the_oracle(answer["output_ids"], prompt, SERVER, "after garbage")
    server.assert_clean()


@pytest.mark.server
def test_a_prefix_is_made_used_listed_and_deleted_over_http(server):
    document, prompt = six_prompts()[3], list(six_prompts()[4])
    create = {"create": "handbook", "length": 100, "budget": 32}
    info = {"name": "handbook", "length": 100, "budget": 32, "judge": "policy"}

    def ask(ids, value, path="/generate"):
        params = {"temperature": 0, "max_new_tokens": 9, "ignore_eos": True, "custom_params": {"kv_prefix": value}}
        body = {"input_ids": ids, "sampling_params": params}
        if path != "/generate":
            body = {
                "model": "m",
                "prompt": ids,
                "max_tokens": 9,
                "temperature": 0,
                "custom_params": {"kv_prefix": value},
            }
        return requests.post(server.url + path, json=body, timeout=60)

    assert ask(list(document), create).json()["meta_info"]["kv_prefix"] == info
    used = ask(prompt, "handbook").json()
    assert used["meta_info"]["kv_prefix"] == info and used["meta_info"]["prompt_tokens"] == 32 + len(prompt)
    prefix = dense_prefix(MODEL, document[:100], document[100:], 32, score=SERVER.score)
    expected = dense_generate(MODEL, prompt, 9, budget=32, buffer=16, prefix=prefix)
    assert_same_tokens(used["output_ids"], expected, "over HTTP")
    assert ask(prompt, "handbook", "/v1/completions").json()["choices"][0]["text"] == used["text"]
    assert ask([5], {"list": True}).json()["meta_info"]["kv_prefix"] == [info]
    taken = ask(list(document), create)
    assert taken.status_code == 400 and "is there already" in taken.text
    assert ask([5], {"delete": "handbook"}).json()["meta_info"]["kv_prefix"] == {"deleted": "handbook"}
    for path in ("/generate", "/v1/completions"):
        unknown = ask(prompt, "handbook", path)
        assert unknown.status_code == 400 and "kv_prefix 'handbook' is unknown here" in unknown.text


def letters(count: int) -> str:
    """Return a text in which no two tokens are kept by a hair's breadth."""
    return "".join(random.Random(count).choices("abcdefghij klmno\n", k=count))


@pytest.mark.server
def test_the_command_makes_a_prefix_of_two_files_lists_and_deletes_it(server, tmp_path, capsys):
    def ran(action, *flags):
        status = main(["prefix", action, "--server", server.url, *flags])
        out, err = capsys.readouterr()
        assert out.count("\n") + err.count("\n") == 1
        return status, out or err

    document, task = letters(240), "Which gate is it?"
    (tmp_path / "doc").write_text(document)
    (tmp_path / "task").write_text(task)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    document_ids, task_ids = tokenizer(document)["input_ids"], tokenizer(task)["input_ids"]
    create = ["create", "--name", "gates", "--document", str(tmp_path / "doc"), "--task", str(tmp_path / "task")]
    status, line = ran(*create, "--budget", "32", "--save-trace", str(tmp_path / "trace"))
    said = f"gates: 32 of {len(document_ids)} tokens"
    assert status == 0 and line.startswith(f"{said}, judged by policy; requests go on from it with")
    status, line = ran(*create, "--budget", "32")
    assert status == 1 and "the server refuses (status 400): kv_prefix 'gates' is there already: take another" in line
    status, line = ran(*create, "--budget", "3000")
    assert status == 1 and "kv_prefix budget 3000 is not less than the length of" in line
    prompt = list(six_prompts()[4])
    used = server.generate(prompt, {"max_new_tokens": 9, "ignore_eos": True, "custom_params": {"kv_prefix": "gates"}})
    prefix = dense_prefix(MODEL, document_ids, task_ids, 32, score=SERVER.score)
    assert_same_tokens(
        used["output_ids"], dense_generate(MODEL, prompt, 9, budget=32, buffer=16, prefix=prefix), "behind two files"
    )
    (kept,) = read_trace(tmp_path / "trace").kept
    expected = prefix.compaction.kept_positions[:, :, :32]
    assert [[head.nonzero()[0].tolist() for head in layer] for layer in kept] == expected.tolist()
    assert read_trace(tmp_path / "trace").token_ids == document_ids
    assert ran("list") == (0, f"{said}, judged by policy\n")
    assert ran("delete", "--name", "gates") == (0, "gates is deleted\n")
    # Without the task, by the document again.
    status, line = ran(*create[:-2], "--no-task", "--budget", "32")
    assert status == 0 and line.startswith(f"{said}, judged by repeat; requests")
    assert ran("delete", "--name", "gates") == (0, "gates is deleted\n")


@pytest.mark.server
def test_the_other_endpoints_drop_custom_params(server):
    message = [{"role": "user", "content": "count on"}]
    for path, body in (
        ("/v1/messages", {"model": "m", "messages": message, "max_tokens": 2}),
        ("/api/chat", {"model": "m", "messages": message, "stream": False, "options": {"num_predict": 2}}),
        ("/api/generate", {"model": "m", "prompt": "count on", "stream": False, "options": {"num_predict": 2}}),
    ):
        answer = requests.post(server.url + path, json={**body, "custom_params": {"kv_budget": 1}}, timeout=60)
        assert answer.status_code == 200, (path, answer.text)


@pytest.mark.server
@pytest.mark.parametrize(
    "refused",
    [
        {"return_sampling_mask": True, "sampling_params": {"max_new_tokens": None}},
        {"sampling_params": {"max_new_tokens": None, "beam_width": 2, "stop": "x"}},
    ],
    ids=["sampling mask", "beam"],
)
def test_a_request_that_sglang_refuses_before_its_length_is_known_ends_no_server(server, refused):
    prompt = list(six_prompts()[0])
    answer = requests.post(f"{server.url}/generate", json={"input_ids": prompt, **refused}, timeout=60)
    assert answer.status_code == 400, answer.text
    params = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}
    assert_as_the_oracle(server.generate(prompt, params)["output_ids"], prompt, SERVER, "after it")
    server.assert_clean()


KEYS = ("kv_policy", "kv_compactions", "kv_resident_tokens", "kv_evicted_tokens", "kv_prompt_tokens")


def expected_info(prompt_len: int, num_tokens: int, budget: int = 32, buffer: int = 16) -> dict[str, object]:
    """Return what a request of so many tokens must say, the last of which is never stored."""
    generated, evicted, compactions = 0, 0, 0
    for _ in range(num_tokens - 1):
        if generated - evicted == budget + buffer:
            evicted, compactions = evicted + buffer, compactions + 1
        generated += 1
    return {
        "kv_policy": "rkv",
        "kv_compactions": compactions,
        "kv_resident_tokens": prompt_len + generated - evicted,
        "kv_evicted_tokens": evicted,
        "kv_prompt_tokens": prompt_len,
    }


def said(meta_info: dict[str, object]) -> dict[str, object]:
    return {key: meta_info[key] for key in KEYS if key in meta_info}


def scraped(server: Server) -> dict[str, float]:
    """Return every series of the policy by name; the buckets of the histogram by name and bound."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(requests.get(f"{server.url}/metrics", timeout=30).text):
        for sample in family.samples:
            if sample.name.startswith("rkv:"):
                assert {"model_name", "engine_type", "tp_rank", "pp_rank"} <= set(sample.labels)
                key = sample.name + sample.labels.get("le", "")
                assert key not in found, key
                found[key] = sample.value
    return found


@pytest.mark.server
def test_metrics_are_the_sums_of_meta_info_and_the_log_tells_resident_from_logical(server):
    prompts = [list(prompt) for prompt in six_prompts()]
    params = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}
    before = scraped(server)
    custom: list[dict[str, object]] = [{}, {"kv_policy": "none"}, {"kv_budget": 17, "kv_buffer": 5}, {}, {}, {}]
    batch = [{**params, "custom_params": asked} for asked in custom]
    batch[3]["max_new_tokens"] = 48
    infos = [answer["meta_info"] for answer in server.generate_many(prompts, batch)]
    server.assert_clean()
    # What SGLang sets when it has nothing to do arrives with its next look.
    deadline = time.monotonic() + 30
    while scraped(server)["rkv:logical_tokens"] > 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    after = scraped(server)
    assert (after["rkv:resident_tokens"], after["rkv:logical_tokens"]) == (0, 0)
    assert after["rkv:side_buffer_bytes"] > 0
    grown = {name: after[name] - before.get(name, 0) for name in after}
    compactions = sum(info["kv_compactions"] for info in infos)
    assert compactions > 20
    assert grown["rkv:compactions_total"] == compactions
    assert grown["rkv:evicted_tokens_total"] == sum(info["kv_evicted_tokens"] for info in infos)
    assert grown["rkv:requests_compressed_total"] == sum(info["kv_compactions"] > 0 for info in infos) == 4
    # Requests that are due at once are compacted at once.
    assert 0 < grown["rkv:compaction_seconds_count"] <= compactions
    assert grown["rkv:compaction_seconds_bucket+Inf"] == grown["rkv:compaction_seconds_count"]
    assert grown["rkv:compaction_seconds_sum"] > 0
    logged = re.findall(r"Decode batch.* #resident/logical: (\d+)/(\d+), ", server.log())
    assert all(int(resident) <= int(logical) for resident, logical in logged)
    assert any(int(resident) + 100 < int(logical) for resident, logical in logged)


@pytest.mark.server
def test_a_trace_tells_what_every_head_kept_and_only_who_asks_gets_one(server):
    prompt = six_prompts()[3]
    params = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    answer = server.generate(list(prompt), {**params, "custom_params": {"kv_trace": True}})
    expected = oracle(MODEL, prompt, NUM_TOKENS, SERVER, answer["output_ids"])
    assert_same_tokens(answer["output_ids"], expected, "traced")
    trace = answer["meta_info"]["kv_trace"]
    num_layers, num_kv_heads, _ = expected.compactions[0].kept_positions.shape
    assert (trace["num_layers"], trace["num_kv_heads"]) == (num_layers, num_kv_heads)
    held = kept_positions(trace["compactions"], num_layers, num_kv_heads, NUM_TOKENS)
    assert len(held) == len(expected.compactions) == answer["meta_info"]["kv_compactions"]
    for mask, compaction in zip(held, expected.compactions, strict=True):
        for layer in range(num_layers):
            for head in range(num_kv_heads):
                kept = compaction.kept_positions[layer, head, len(prompt) :] - len(prompt)
                assert mask[layer, head].nonzero()[0].tolist() == kept.tolist()
    none = server.generate(list(prompt), {**params, "custom_params": {"kv_trace": True, "kv_policy": "none"}})
    assert none["meta_info"]["kv_trace"]["compactions"] == []
    assert "kv_trace" not in server.generate(list(prompt), params)["meta_info"]


@pytest.mark.server
def test_the_view_of_a_prompt_has_what_every_head_kept_of_it(server, tmp_path, capsys):
    prompt, trace = letters(200), tmp_path / "trace"
    flags = ["--prompt", prompt, "--prompt-budget", "40", "--max-new-tokens", "20", "--save-trace", str(trace)]
    assert main(["view", "--server", server.url, *flags, "-o", str(tmp_path / "page")]) == 0
    ids = AutoTokenizer.from_pretrained(MODEL)(prompt)["input_ids"]
    assert f"40 of {len(ids)} tokens of the prompt (rkv)" in capsys.readouterr().out
    found = read_trace(trace)
    assert found.token_ids == ids and "".join(found.tokens) == prompt
    (kept,) = found.kept
    (compaction,) = dense_generate(MODEL, ids, 20, budget=32, buffer=16, prompt_budget=40).compactions
    # Behind those of the prompt come what it had generated.
    expected = compaction.kept_positions[:, :, :40].tolist()
    assert [[head.nonzero()[0].tolist() for head in layer] for layer in kept] == expected


@pytest.mark.server
def test_an_openai_answer_says_it_too_if_asked_for_meta_info(server):
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "count on"}],
        "max_tokens": 150,
        "temperature": 0,
        "ignore_eos": True,
        "return_meta_info": True,
    }
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    prompt_len = answer["usage"]["prompt_tokens"]
    assert said(answer["choices"][0]["meta_info"]) == expected_info(prompt_len, 150)


@pytest.mark.server
def test_meta_info_says_what_was_compressed_and_the_sum_is_the_servers(server):
    prompts = [list(prompt) for prompt in six_prompts()]
    params = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}
    before = server.server_info()["internal_states"][0]["kv_policy_stats"]["compactions"]
    # One that is too short, one of each number of compactions, and one at the very last token before one.
    lengths = [1, 48, 49, 50, 66, 150]
    batch = [{**params, "max_new_tokens": length} for length in lengths]
    answers = server.generate_many(prompts, batch)
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        assert said(answer["meta_info"]) == expected_info(len(prompt), length), length
    total = sum(answer["meta_info"]["kv_compactions"] for answer in answers)

    # Only the last chunk of a stream says it, so that no chunk says what is not true yet.
    body = {"input_ids": prompts[0], "sampling_params": params, "stream": True}
    lines = requests.post(server.url + "/generate", json=body, timeout=120).text.splitlines()
    chunks = [json.loads(line[5:]) for line in lines if line.startswith("data:") and "[DONE]" not in line]
    assert len(chunks) > 2
    assert all(said(chunk["meta_info"]) == {} for chunk in chunks[:-1])
    assert said(chunks[-1]["meta_info"]) == expected_info(len(prompts[0]), 150)
    total += chunks[-1]["meta_info"]["kv_compactions"]

    none = server.generate(prompts[1], {**params, "custom_params": {"kv_policy": "none"}})
    assert said(none["meta_info"]) == {
        "kv_policy": "none",
        "kv_compactions": 0,
        "kv_resident_tokens": len(prompts[1]) + 149,
        "kv_evicted_tokens": 0,
        "kv_prompt_tokens": len(prompts[1]),
    }
    several = server.generate(prompts[2], {**params, "n": 3})
    assert [said(answer["meta_info"]) for answer in several] == [expected_info(len(prompts[2]), 150)] * 3
    total += sum(answer["meta_info"]["kv_compactions"] for answer in several)
    stats = server.server_info()["internal_states"][0]["kv_policy_stats"]
    assert stats["compactions"] - before == total
    server.assert_clean()
