"""The client of the serving benchmark against a server that answers by a fixed rule."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.serving.client import replay
from benchmarks.serving.rows import token_gaps
from benchmarks.serving.trace import Conversation, Turn

REFUSED, ABORTED, SLOW = 400, 401, 402


class Echo(BaseHTTPRequestHandler):
    """Answers with 1000, 1001, ... in two chunks, the second of all tokens but one; some first tokens have it fail."""

    requests: list[dict[str, Any]]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(asked)
        prompt, count = asked["input_ids"], asked["sampling_params"]["max_new_tokens"]
        self.send_response(400 if prompt[0] == REFUSED else 200)
        self.end_headers()
        if prompt[0] == REFUSED:
            self.wfile.write(b'{"error": {"message": "too long"}}\n')
            return
        for first, last in ((0, 1), (1, count)):
            finish = None if last < count else {"type": "abort" if prompt[0] == ABORTED else "length"}
            meta = {"finish_reason": finish, "completion_tokens": last, "cached_tokens": 3}
            event = {"output_ids": list(range(1000 + first, 1000 + last)), "meta_info": meta}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
            time.sleep(5 if prompt[0] == SLOW else 0.05)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def echo() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A running server: its address and the requests it got."""
    handler = type("Handler", (Echo,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requests  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_conversation_goes_on_with_what_was_answered(echo: tuple[str, list[dict[str, Any]]]) -> None:
    url, requests = echo
    records = replay(url, [Conversation(0.0, (Turn((5, 6), 3), Turn((7,), 2), Turn((8,), 2)))], timeout_s=30)
    prompts = [request["input_ids"] for request in requests]
    assert prompts == [[5, 6], [5, 6, 1000, 1001, 1002, 7], [5, 6, 1000, 1001, 1002, 7, 1000, 1001, 8]]
    assert [record.prompt_len for record in records] == [2, 6, 9]
    assert [record.output_len for record in records] == [3, 2, 2] and {record.error for record in records} == {None}
    assert [request["sampling_params"]["max_new_tokens"] for request in requests] == [3, 2, 2]
    assert all(request["sampling_params"]["ignore_eos"] for request in requests)
    assert records[0].meta_info["cached_tokens"] == 3
    gaps = token_gaps(records[0])
    # Two tokens came with the second chunk, 0.05 s after the first.
    assert sorted(gaps) == [1, 2] and gaps[1] == gaps[2] > 0.01


def test_conversations_are_sent_when_they_arrive(echo: tuple[str, list[dict[str, Any]]]) -> None:
    url, _ = echo
    records = replay(url, [Conversation(arrival, (Turn((5,), 2),)) for arrival in (0.0, 0.3, 0.6)], timeout_s=30)
    for record, arrival in zip(records, (0.0, 0.3, 0.6), strict=True):
        assert arrival <= record.sent_s < arrival + 2 and record.chunks[0][0] > record.sent_s


@pytest.mark.parametrize(("first", "reason"), [(REFUSED, "too long"), (ABORTED, "abort")])
def test_a_failed_request_ends_its_conversation_only(
    echo: tuple[str, list[dict[str, Any]]], first: int, reason: str
) -> None:
    url, requests = echo
    bad, good = (Conversation(0.0, (Turn((token,), 2), Turn((9,), 2))) for token in (first, 5))
    records = replay(url, [bad, good], timeout_s=30)
    assert len(records) == len(requests) == 3
    assert reason in str(records[0].error) and [record.error for record in records[1:]] == [None, None]


def test_a_replay_has_a_time_limit(echo: tuple[str, list[dict[str, Any]]]) -> None:
    with pytest.raises(TimeoutError):
        replay(echo[0], [Conversation(0.0, (Turn((SLOW,), 3),))], timeout_s=0.3)
