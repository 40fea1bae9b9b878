"""Recording from a stand-in server: what is asked, what comes back, and one line for every way it can fail."""

import socket
from dataclasses import replace

import pytest

from rkv_sglang.client.http import is_loopback
from rkv_sglang.view.record import record
from rkv_sglang.view.record_text import record_prompt
from tests.cache.trace_cases import random_history
from tests.view.expected import trace_of
from tests.view.stand_in import events, server_info, stand_in


@pytest.fixture
def server():
    with stand_in() as server:
        yield server


@pytest.fixture
def trace(rng):
    history = random_history(rng, num_layers=2, num_kv_heads=2, budget=9, buffer=4, num_tokens=40)
    return trace_of(history, rng, tokens=[*(f" {number}" for number in range(37)), "", "", "🌟"])


def recorded(server, prompt: str = "What is it?\n"):
    return record(f"{server.url}/", prompt, max_new_tokens=640, temperature=0.7)


@pytest.mark.parametrize("incremental", [False, True])
def test_a_recording_is_what_the_server_sent(server, trace, incremental):
    server.say("/server_info", server_info(trace, incremental_streaming_output=incremental))
    server.stream(*events(trace, [1, 17], incremental))
    assert recorded(server) == trace
    (asked,) = server.asked
    sampling = asked.pop("sampling_params")
    assert asked == {
        "text": "What is it?\n",
        "stream": True,
        "return_logprob": True,
        "return_text_in_logprobs": True,
    }
    assert (sampling["max_new_tokens"], sampling["temperature"]) == (640, 0.7)
    assert sampling["custom_params"] == {"kv_trace": True}
    # Few events for a long answer, because each repeats the whole of it.
    assert 640 / sampling["stream_interval"] <= 100


def test_a_server_with_a_key_gets_it_with_every_request(server, trace):
    server.api_key = "secret 🌟".encode().hex()
    server.say("/server_info", server_info(trace))
    server.stream(*events(trace, [5]))
    assert record(server.url, trace.prompt, max_new_tokens=640, temperature=0.7, api_key=server.api_key) == trace
    assert server.keys == [server.api_key] * 2
    assert "give --api-key, or the variable RKV_SGLANG_API_KEY" in refusal(server)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_server_on_this_machine_is_reached_past_any_proxy(server, trace, monkeypatch, variable):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv(variable, f"http://127.0.0.1:{probe.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        server.say("/server_info", server_info(trace))
        server.stream(*events(trace, []))
        assert recorded(server) == trace


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:30000", True),
        ("http://127.8.9.1/x", True),
        ("http://localhost:1", True),
        ("http://[::1]:30000/generate", True),
        ("http://127.0.0.1.example.org", False),
        ("http://10.0.0.1:30000", False),
        ("http://localhost.example.org", False),
        ("nonsense", False),
    ],
)
def test_only_the_loopback_is_reached_past_a_proxy(url, expected):
    assert is_loopback(url) == expected


def test_what_stays_of_a_prompt_is_recorded_with_its_tokens(server, rng):
    ids = [1, *(10 + ord(letter) for letter in "What is it?\n")]
    history = random_history(rng, num_layers=2, num_kv_heads=2, budget=6, buffer=len(ids) - 6, num_tokens=len(ids))
    expected = trace_of(history, rng, tokens=["<s>", *"What is it?\n"], ids=ids, prompt="", prompt_len=0)
    server.say("/server_info", server_info(expected))
    server.answers["/tokenize"] = lambda asked: {"tokens": ids if asked["add_special_tokens"] else ids[1:]}
    server.answers["/detokenize"] = lambda asked: {
        "text": ["".join("<s>" if token == 1 else chr(token - 10) for token in part) for part in asked["tokens"]]
    }
    recorded = {"num_layers": 2, "num_kv_heads": 2, "compactions": [], "prompt": history.compactions[0]}
    meta_info = {"kv_policy": expected.policy, "kv_trace": recorded, "finish_reason": {"type": "length"}}
    meta_info["kv_prompt_tokens"] = 6
    server.say("/generate", {"meta_info": meta_info})
    settings = {"budget": 6, "max_new_tokens": 20, "temperature": 0}
    assert record_prompt(server.url, "What is it?\n", **settings) == replace(expected, subject="prompt")
    (asked,) = [body for body in server.asked if "input_ids" in body]
    assert asked["input_ids"] == ids
    assert asked["sampling_params"]["custom_params"] == {"kv_trace": True, "kv_prompt_budget": 6}
    for change, said in (
        ({"kv_trace": {"compactions": []}}, "left the prompt of 13 tokens whole: set --prompt-budget below that"),
        ({"kv_trace": {**recorded, "num_layers": 3}}, "damaged"),
        ({"kv_prompt_tokens": 7}, "keeps another number than the budget"),
        ({"kv_trace": {**recorded, "prompt": 5}}, "is not of type dict"),
        ({"kv_trace": 5}, "unlike SGLang"),
        ({"finish_reason": {"type": "abort", "message": "too full"}}, "the server refuses: too full"),
    ):
        server.say("/generate", {"meta_info": {**meta_info, **change}})
        with pytest.raises(ValueError, match=said) as caught:
            record_prompt(server.url, "What is it?\n", **settings)
        assert "\n" not in str(caught.value)


def refusal(server) -> str:
    with pytest.raises(ValueError) as caught:
        recorded(server)
    message = str(caught.value)
    assert "\n" not in message and message.strip()
    return message


def test_no_server_and_no_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    for address, said in (
        (f"http://127.0.0.1:{free}", "is a server running there"),
        ("127.0.0.1:30000", "write http://127.0.0.1:30000"),
        ("file:///etc/passwd", "no address"),
        ("http://127.0.0.1:port", "check --server"),
        ("http://a b/", "check --server"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            record(address, "x", max_new_tokens=1, temperature=0)
        assert "\n" not in str(caught.value)


def test_something_else_than_a_server_with_a_policy(server, trace):
    assert "status 404" in refusal(server)
    server.say("/server_info", b"<html>")
    assert "no SGLang server" in refusal(server)
    server.say("/server_info", [1])
    assert "--kv-policy rkv --kv-trace" in refusal(server)
    server.say("/server_info", {"model_path": "m"})
    assert "--kv-policy rkv --kv-trace" in refusal(server)
    server.say("/server_info", server_info(trace, kv_policy="none"))
    assert "--kv-policy rkv --kv-trace" in refusal(server)
    assert server.asked == []


def test_what_the_server_refuses_is_passed_on(server, trace):
    message = "kv_trace is off on this server: start it with --kv-trace or leave kv_trace out"
    server.say("/server_info", server_info(trace))
    server.say("/generate", {"error": {"message": message}}, status=400)
    assert refusal(server) == f"the server refuses (status 400): {message}"
    server.say("/generate", {"error": "two\nlines"}, status=400)
    assert refusal(server) == "the server refuses (status 400): two lines"
    server.say("/generate", b"<h1>oh</h1>", status=500)
    assert "status 500" in refusal(server)
    # A stream has begun with status 200 before the request is looked at.
    server.stream({"error": {"message": message, "code": 400}})
    assert refusal(server) == f"the server refuses: {message}"
    aborted = events(trace, [])[-1]
    aborted["meta_info"] |= {"finish_reason": {"type": "abort", "message": message, "status_code": 400}}
    server.stream(aborted)
    assert refusal(server) == f"the server refuses: {message}"


def test_an_answer_that_makes_no_sense(server, trace):
    server.say("/server_info", server_info(trace))
    *first, last = events(trace, [10, 20])
    server.stream(*first)
    assert "middle of the answer" in refusal(server)
    server.stream()
    assert "middle of the answer" in refusal(server)
    server.stream(b'{"text": "half')
    assert "not JSON" in refusal(server)
    server.stream({"text": "", "meta_info": {}})
    assert "unlike SGLang" in refusal(server)
    server.stream([])
    assert "unlike SGLang" in refusal(server)
    del last["meta_info"]["kv_trace"]
    server.stream(last)
    assert "recorded nothing" in refusal(server)
    *_, last = events(trace, [])
    last["meta_info"]["kv_trace"]["compactions"][0] = {**trace.compactions[0], "resident_len": 12}
    server.stream(last)
    assert "damaged" in refusal(server)
    server.say("/server_info", {"kv_policy": "rkv"})
    server.stream(events(trace, [])[-1])
    assert "unlike SGLang" in refusal(server)


def test_an_answer_that_breaks_off(server, trace):
    server.say("/server_info", server_info(trace))
    server.stream(*events(trace, [10])[:1], done=False)
    assert "middle of the answer" in refusal(server)
