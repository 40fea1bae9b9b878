"""What a user does with a server, on one that compacts: everything answers as it should, and nothing is lost."""

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import sglang as sgl
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from devtools.launch import free_port
from devtools.tiny_models import EOS_ID, tiny_model_path, tiny_tokenizer
from tests.e2e.workload import Setting, assert_same_tokens, oracle, random_ids, six_prompts
from tests.support.harness.grpc_call import call_openai
from tests.support.harness.server import Server
from tests.support.oracle.dense import dense_generate

pytestmark = pytest.mark.server

MODEL = tiny_model_path("qwen3")
SETTING = Setting(budget=30, buffer=18)
NUM_TOKENS = 150
IGNORE_EOS = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(grpc_port: int) -> Iterator[Server]:
    flags = ["--model-path", str(MODEL), "--page-size", "16", "--max-total-tokens", "8192", "--enable-metrics"]
    flags += ["--schedule-policy", "lpm", "--enable-cache-report", "--enable-return-hidden-states"]
    flags += ["--grpc-port", str(grpc_port)]
    env = {"RKV_PROBE_MAX_PRIVATE": str(SETTING.budget + SETTING.buffer)}
    with Server([*flags, *SETTING.flags], env=env) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_lost(server: Server) -> Iterator[None]:
    """After every test the pool is as at start and the probe saw no shared byte change."""
    yield
    server.assert_clean()


def expected_text_ids(prompt: tuple[int, ...]) -> list[int]:
    return oracle(MODEL, prompt, NUM_TOKENS, SETTING).output_ids


def assert_as_the_oracle(found: list[int], prompt: tuple[int, ...], name: str) -> None:
    assert_same_tokens(found, oracle(MODEL, prompt, NUM_TOKENS, SETTING, found), name)


def test_concurrent_requests_answer_as_the_oracle(server):
    prompts = six_prompts()
    answers = server.generate_many([list(prompt) for prompt in prompts], IGNORE_EOS)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert_as_the_oracle(answer["output_ids"], prompt, f"request {i}")


def test_logprobs_are_those_of_the_compacted_cache(server):
    prompt = six_prompts()[1]
    answer = server.generate(list(prompt), IGNORE_EOS, return_logprob=True, logprob_start_len=0, top_logprobs_num=2)
    expected = oracle(MODEL, prompt, NUM_TOKENS, SETTING)
    found = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    assert found == pytest.approx(expected.logprobs, abs=2e-3)
    first, *others = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)(torch.tensor([prompt])).logits[0]
    right = logits[:-1].log_softmax(dim=1).gather(1, torch.tensor(prompt)[1:, None])[:, 0]
    assert first is None and others == pytest.approx(right.tolist(), abs=2e-3)


def test_streaming_gives_the_same_tokens_piece_by_piece(server):
    prompt = six_prompts()[2]
    chunks = list(server.stream(list(prompt), IGNORE_EOS))
    assert len(chunks) > 50
    assert_as_the_oracle(chunks[-1]["output_ids"], prompt, "streamed")


def test_a_stream_in_larger_pieces_gives_the_same_tokens(server):
    prompt = six_prompts()[3]
    chunks = list(server.stream(list(prompt), {**IGNORE_EOS, "stream_interval": 40}))
    assert len(chunks) < 10
    assert_as_the_oracle(chunks[-1]["output_ids"], prompt, "streamed")


def test_hidden_states_are_those_that_the_next_tokens_come_from(server):
    prompt = six_prompts()[4]
    answer = server.generate(list(prompt), IGNORE_EOS, return_hidden_states=True)
    assert_as_the_oracle(answer["output_ids"], prompt, "with hidden states")
    of_prompt, *of_outputs = answer["meta_info"]["hidden_states"]
    states = torch.tensor([of_prompt[-1], *of_outputs])
    (file,) = MODEL.glob("*.safetensors")
    logits = states @ load_file(file)["lm_head.weight"].T
    assert logits.argmax(dim=1).tolist() == answer["output_ids"][: len(states)]
    assert len(states) >= NUM_TOKENS - 1


def test_a_completion_repeats_its_prompt_if_asked_and_says_what_was_cached(server):
    prompt = six_prompts()[5]
    text = tiny_tokenizer().decode(prompt)
    body = {"model": "default", "prompt": text, "max_tokens": NUM_TOKENS, "temperature": 0}
    whole, plain = (
        requests.post(f"{server.url}/v1/completions", json=body | more, timeout=120).json()
        for more in ({"echo": True, "logprobs": 1}, {})
    )
    (first,), (second,) = whole["choices"], plain["choices"]
    assert first["text"] == text + second["text"]
    assert len(first["logprobs"]["tokens"]) == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    # Whole pages of the prompt; the last of its tokens is always computed.
    cached = plain["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < plain["usage"]["prompt_tokens"] and cached % 16 == 0


def test_a_score_is_the_models_own(server):
    prompt, items, labels = list(six_prompts()[2]), [[5, 6, 7], [8, 9]], [11, 12, 13]
    body = {"model": "default", "query": prompt, "items": items, "label_token_ids": labels, "apply_softmax": True}
    found = requests.post(f"{server.url}/v1/score", json=body, timeout=120).json()["scores"]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for item, scores in zip(items, found, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *item]])).logits[0, -1]
        assert scores == pytest.approx(logits[labels].softmax(dim=0).tolist(), abs=1e-4)


def test_parallel_samples_of_one_prompt_share_it_and_answer_alike(server):
    prompt = six_prompts()[4]
    answers = server.generate(list(prompt), {**IGNORE_EOS, "n": 3})
    assert len(answers) == 3
    for answer in answers:
        assert_as_the_oracle(answer["output_ids"], prompt, "sample")


def test_sampled_tokens_have_the_logprobs_that_the_oracle_gives_them(server):
    prompt = six_prompts()[0]
    answer = server.generate(
        list(prompt), {**IGNORE_EOS, "temperature": 1.0, "top_p": 0.95, "sampling_seed": 7}, return_logprob=True
    )
    sampled = answer["output_ids"]
    expected = dense_generate(
        MODEL, prompt, NUM_TOKENS, budget=30, buffer=18, forced_output_ids=sampled, guessed_output_ids=sampled
    )
    found = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    assert found == pytest.approx(expected.logprobs, abs=2e-3)


def test_stop_string_after_compactions(server):
    prompt = six_prompts()[3]
    answer = server.generate(list(prompt), IGNORE_EOS)
    full, ids, tokenizer = answer["text"], answer["output_ids"], tiny_tokenizer()
    # Something that occurs for the first time well after the first compactions. Not right after the hundredth token:
    # SGLang sends what it has after every 50, and of a stop that comes then it leaves a part, without a policy, too.
    later = range(len(tokenizer.decode(ids[:105], skip_special_tokens=True)), len(full) - 4)
    start = next(i for i in later if full.index(full[i : i + 4]) == i)
    stopped = server.generate(list(prompt), {**IGNORE_EOS, "stop": [full[start : start + 4]]})
    assert stopped["text"] == full[:start]
    assert stopped["meta_info"]["finish_reason"]["type"] == "stop"
    assert stopped["meta_info"]["completion_tokens"] > SETTING.budget + SETTING.buffer


def test_end_of_sequence_token_after_compactions(server):
    prompt = six_prompts()[5]
    ids = expected_text_ids(prompt)
    stop_at = next(i for i in range(100, NUM_TOKENS) if ids.index(ids[i]) == i)
    answer = server.generate(list(prompt), {**IGNORE_EOS, "ignore_eos": False, "stop_token_ids": [ids[stop_at]]})
    eos = next((i for i, token in enumerate(ids) if token == EOS_ID), NUM_TOKENS)
    assert answer["output_ids"] == ids[: min(stop_at, eos) + 1]


def test_grammar_constrained_output_holds_through_compactions(server):
    # Long enough for several compactions, and impossible to get right by chance.
    answer = server.generate(
        list(six_prompts()[0]), {"max_new_tokens": 400, "regex": r"([a-f]{3}=[0-9]{2};){28}", "temperature": 0}
    )
    assert re.fullmatch(r"([a-f]{3}=[0-9]{2};){28}", answer["text"])
    assert answer["meta_info"]["completion_tokens"] > 2 * (SETTING.budget + SETTING.buffer)


def test_openai_chat_answers_and_counts_tokens(server):
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "count on"}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    assert answer["usage"]["completion_tokens"] == NUM_TOKENS


def test_however_a_chat_is_asked_for_its_answer_is_the_same(server):
    """What passes no custom_params on, and says nothing of the policy, has the server's budget."""
    message, custom = [{"role": "user", "content": "count on"}], {"custom_params": {"kv_budget": 1}}

    def ask(path, **body):
        answer = requests.post(server.url + path, json=body, timeout=120)
        assert answer.status_code == 200, (path, answer.text)
        return answer

    chat = {"model": "default", "messages": message, "temperature": 0}
    (right,) = ask("/v1/chat/completions", **chat, max_tokens=NUM_TOKENS, return_meta_info=True).json()["choices"]
    text = right["message"]["content"]
    assert right["meta_info"]["kv_compactions"] > 1
    # SGLang takes two off.
    greedy = {"model": str(MODEL), "temperature": 0, "max_output_tokens": NUM_TOKENS + 2, **custom}
    for asked in ("count on", message):
        response = ask("/v1/responses", input=asked, **greedy)
        (said,) = response.json()["output"]
        assert said["content"][0]["text"] == text and "kv_" not in response.text
    streamed = ask("/v1/responses", input="count on", stream=True, **greedy).text
    pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(piece["delta"] for piece in pieces if piece["type"] == "response.output_text.delta") == text
    assert "kv_" not in streamed
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = ask("/v1/chat/completions", **chat, max_tokens=NUM_TOKENS, **streaming).text
    pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"]) == text
    assert "kv_" not in streamed
    said = ask("/v1/messages", **chat, max_tokens=NUM_TOKENS, **custom).json()
    assert said["content"][0]["text"] == text
    options = {"temperature": 0, "num_predict": NUM_TOKENS}
    said = ask("/api/chat", model="m", messages=message, stream=False, options=options).json()
    assert said["message"]["content"] == text


def test_what_this_model_cannot_answer_is_refused_and_the_server_serves_on(server):
    """It is no embedding model and no reranker; that is SGLang's to say."""
    for path, body in (
        ("/v1/embeddings", {"model": "default", "input": "count on"}),
        ("/v1/classify", {"model": "default", "input": "count on"}),
        ("/v1/rerank", {"query": "count", "documents": ["on", "off"]}),
    ):
        answer = requests.post(server.url + path, json=body, timeout=60)
        assert answer.status_code == 400, (path, answer.status_code, answer.text)
    prompt = six_prompts()[1]
    assert_as_the_oracle(server.generate(list(prompt), IGNORE_EOS)["output_ids"], prompt, "after them")


@pytest.mark.parametrize(("custom", "compactions"), [({}, 6), ({"kv_budget": 20, "kv_buffer": 10}, 12)])
def test_over_grpc_answers_are_those_over_http(server, grpc_port, custom, compactions):
    body = {"model": "default", "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "custom_params": custom}
    for path, method, more in (
        ("/v1/chat/completions", "ChatComplete", {"messages": [{"role": "user", "content": "count on"}]}),
        ("/v1/completions", "Complete", {"prompt": "count on"}),
    ):
        asked = body | more | {"return_meta_info": True}
        right = requests.post(server.url + path, json=asked, timeout=120).json()["choices"][0]
        (message,) = call_openai(grpc_port, method, asked)
        answer = json.loads(message[message.index("{") : message.rindex("}") + 1])["choices"][0]
        assert answer.get("message") == right.get("message") and answer.get("text") == right.get("text")
        told = ("kv_policy", "kv_compactions", "kv_evicted_tokens", "kv_prompt_tokens")
        if method == "ChatComplete":
            assert [answer["meta_info"][name] for name in told] == [right["meta_info"][name] for name in told]
            assert answer["meta_info"]["kv_compactions"] == compactions


def test_clients_that_vanish_and_aborts_at_any_step_lose_nothing(server):
    rng = random.Random(11)
    prompts = six_prompts()

    def vanish(i: int) -> None:
        chunks = server.stream(list(prompts[i % 6]), {**IGNORE_EOS, "max_new_tokens": 400}, rid=f"vanish-{i}")
        for _ in range(rng.randint(1, 70)):
            next(chunks)
        chunks.close()

    def abort(i: int) -> None:
        thread = threading.Thread(
            target=server.generate,
            args=(list(prompts[i % 6]), {**IGNORE_EOS, "max_new_tokens": 2000}),
            kwargs={"rid": f"abort-{i}"},
        )
        thread.start()
        time.sleep(rng.uniform(0.05, 1.5))
        server.abort(f"abort-{i}")
        thread.join(60)
        assert not thread.is_alive()

    threads = [threading.Thread(target=vanish if i % 2 else abort, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    survivor = server.generate(list(prompts[0]), IGNORE_EOS)
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert_as_the_oracle(survivor["output_ids"], prompts[0], "the one that stayed")


def test_flush_cache_empties_the_tree_and_the_next_answer_is_the_same(server):
    prompt = [*six_prompts()[2], 17]
    first = server.generate(prompt, IGNORE_EOS)
    again = server.generate(prompt, IGNORE_EOS)
    server.drain()
    server.flush_cache()
    flushed = server.generate(prompt, IGNORE_EOS)
    assert first["output_ids"] == again["output_ids"] == flushed["output_ids"]
    assert again["meta_info"]["cached_tokens"] == (len(prompt) - 1) // 16 * 16
    assert flushed["meta_info"]["cached_tokens"] == 0


def test_server_info_counts_what_was_done(server):
    before = server.server_info()["internal_states"][0]["kv_policy_stats"]
    server.generate(random_ids(random.Random(2), 20), IGNORE_EOS)
    assert requests.get(f"{server.url}/health_generate", timeout=60).status_code == 200
    server.drain()
    info = server.server_info()
    after = info["internal_states"][0]["kv_policy_stats"]
    compactions = len(range(48, NUM_TOKENS - 1, 18))
    assert after["compactions"] - before["compactions"] == compactions
    assert after["evicted_tokens"] - before["evicted_tokens"] == 18 * compactions
    assert after["requests_compressed"] - before["requests_compressed"] == 1
    assert after["peak_private_tokens"] == 48
    assert after["requests_answered"] - before["requests_answered"] == 1
    assert after["answers_compressed"] - before["answers_compressed"] == 1
    assert after["compressed_share"] == round(after["answers_compressed"] / after["requests_answered"], 4)
    assert after["side_buffer_bytes"] > 0
    assert (after["settings"]["policy"], after["settings"]["budget"], after["settings"]["buffer"]) == ("rkv", 30, 18)
    assert (info["kv_policy"], info["rkv_budget"], info["rkv_buffer"]) == ("rkv", 30, 18)
    assert json.dumps(after)


def test_a_frontend_program_forks_selects_and_takes_turns_on_a_server_that_compacts(server):
    @sgl.function
    def program(s: Any) -> None:
        s += "Tell me of "
        s += sgl.gen("first", max_tokens=90, ignore_eos=True)
        forks = s.fork(3)
        for i, fork in enumerate(forks):
            fork += f"branch {i}: " + sgl.gen("branch", max_tokens=100, ignore_eos=True)
        s += "In short: " + " ".join(fork["branch"][:4] for fork in forks)
        s += "It is " + sgl.select("choice", choices=["good", "bad", "neither"])
        s += " and " + sgl.gen("last", max_tokens=60, ignore_eos=True)

    before = server.server_info()["internal_states"][0]["kv_policy_stats"]["requests_compressed"]
    endpoint = sgl.RuntimeEndpoint(server.url)
    runs = [program.run(backend=endpoint, temperature=0) for _ in range(2)]
    assert runs[0]["choice"] in ("good", "bad", "neither")
    assert [run[name] for run in runs for name in ("first", "choice", "last")] == [
        *(runs[0][name] for name in ("first", "choice", "last")),
    ] * 2
    info = runs[0].get_meta_info("first")
    assert (info["kv_policy"], info["kv_compactions"]) == ("rkv", len(range(48, 89, 18)))
    after = server.server_info()["internal_states"][0]["kv_policy_stats"]["requests_compressed"]
    # Of each run the first answer, three branches and the last one, each longer than budget and buffer.
    assert after - before == 2 * 5
