"""What goes wrong around a server: aborts while requests wait, clients that stop, a scheduler that dies."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import requests

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, oracle, six_prompts
from tests.support.harness.server import Server

pytestmark = pytest.mark.server

MODEL = tiny_model_path("llama-gqa")
SETTING = Setting(budget=24, buffer=16)
# So small that a request is soon too long to be computed again.
POOL = 160
PROMPT = six_prompts()[4]
SOON, ENDLESS = 170, 8000
STREAMED = {"stream_interval": 10}
KEYS = ("kv_policy", "kv_compactions", "kv_resident_tokens", "kv_evicted_tokens", "kv_prompt_tokens")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ["--model-path", str(MODEL), "--max-total-tokens", str(POOL), "--max-running-requests", "2"]
    with Server([*flags, *SETTING.flags]) as running:
        yield running


def params(num_tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True, **STREAMED}


def post(server: Server, path: str, **body: Any) -> None:
    requests.post(f"{server.url}{path}", json=body, timeout=60).raise_for_status()


def ended(server: Server, rid: str, end: Callable[[], None]) -> dict[str, Any]:
    """Stream an endless answer, do this once it is longer than the pool, and return its last chunk."""
    is_told = False
    for chunk in server.stream(list(PROMPT), params(ENDLESS), rid=rid):
        if not is_told and chunk["meta_info"]["completion_tokens"] > SOON:
            is_told = True
            end()
    assert is_told
    return dict(chunk)


def assert_as_held(chunk: dict[str, Any]) -> None:
    """Assert that an answer that ended while it waited has right tokens, and fields that say what was done to it."""
    info, ids = chunk["meta_info"], chunk["output_ids"]
    assert info["completion_tokens"] == len(ids) > SOON
    right = oracle(MODEL, PROMPT, SOON, SETTING, ids[:SOON])
    assert_same_tokens(ids[:SOON], right, "before it ended")
    evicted = 0
    for generated in range(len(ids) - 1):
        if generated - evicted == SETTING.budget + SETTING.buffer:
            evicted += SETTING.buffer
    assert [info.get(key) for key in KEYS] == ["rkv", evicted // SETTING.buffer, 0, evicted, len(PROMPT)]


def assert_fresh(server: Server, rid: str) -> None:
    """Assert that a request sent again under an id is answered as under no id."""
    # SGLang aborts whatever has a stream's id two seconds after the stream ended.
    time.sleep(2.5)
    again, plain = (server.generate(list(PROMPT), params(60), **fields) for fields in ({"rid": rid}, {}))
    assert_same_tokens(again["output_ids"], oracle(MODEL, PROMPT, 60, SETTING, again["output_ids"]), "sent again")
    assert again["text"] == plain["text"]


def pause_and(server: Server, path: str, **body: Any) -> None:
    post(server, "/pause_generation", mode="retract")
    post(server, path, **body)
    post(server, "/continue_generation")


def test_an_answer_that_is_aborted_while_it_waits_is_whole_and_its_id_free(server):
    chunk = ended(server, "paused", lambda: pause_and(server, "/abort_request", abort_all=True))
    end = chunk["meta_info"]["finish_reason"]
    assert (end["type"], end["status_code"]) == ("abort", None)
    assert_as_held(chunk)
    assert_fresh(server, "paused")
    server.assert_clean()


def test_the_policys_own_503_is_whole_and_its_id_free(server):
    chunk = ended(server, "flushed", lambda: pause_and(server, "/flush_cache"))
    end = chunk["meta_info"]["finish_reason"]
    assert (end["type"], end["status_code"]) == ("abort", 503)
    assert "the cache was flushed before its compressed KV was put back: send it again" in end["message"]
    assert_as_held(chunk)
    assert_fresh(server, "flushed")
    server.assert_clean()


def test_a_request_aborted_in_the_queue_says_that_it_held_nothing(server):
    runners = [server.stream(list(PROMPT), params(ENDLESS), rid=f"running-{i}") for i in range(2)]
    for runner in runners:
        next(runner)
    answers: list[dict[str, Any]] = []
    queued = threading.Thread(
        target=lambda: answers.append(server.generate(list(PROMPT), params(50), rid="queued", timeout=60))
    )
    queued.start()
    # Until it is known there is nothing to abort.
    while queued.is_alive():
        server.abort("queued")
        queued.join(0.2)
    for i, runner in enumerate(runners):
        server.abort(f"running-{i}")
        assert list(runner)[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    (answer,) = answers
    assert answer["meta_info"]["finish_reason"]["message"] == "Abort in waiting queue"
    assert (answer["output_ids"], answer["text"]) == ([], "")
    assert [answer["meta_info"].get(key) for key in KEYS] == ["rkv", 0, 0, 0, len(PROMPT)]
    assert_fresh(server, "queued")
    server.assert_clean()


def test_a_client_that_stops_reading_holds_up_nobody(server):
    body = json.dumps({"input_ids": list(PROMPT), "sampling_params": params(3000), "stream": True}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert client.recv(64).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            answer = server.generate(list(PROMPT), params(SOON))
            expected = oracle(MODEL, PROMPT, SOON, SETTING, answer["output_ids"])
            assert_same_tokens(answer["output_ids"], expected, "beside it")
    server.assert_clean()


def test_a_killed_scheduler_ends_the_server_and_every_answer(server):
    """The last test of this server."""
    process = server._process
    assert process is not None
    children = psutil.Process(process.pid).children(recursive=True)
    (scheduler,) = (child for child in children if "scheduler" in "".join(child.cmdline()))
    seen: list[dict[str, Any]] = []
    with pytest.raises((requests.RequestException, StopIteration)):
        for chunk in server.stream(list(PROMPT), params(ENDLESS), timeout=60):
            seen.append(chunk)
            if len(seen) == 3:
                os.kill(scheduler.pid, signal.SIGKILL)
        raise StopIteration
    assert all(chunk["meta_info"]["finish_reason"] is None for chunk in seen)
    assert process.wait(60) != 0
