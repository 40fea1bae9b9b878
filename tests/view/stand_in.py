"""A stand-in for an SGLang server: it gives the answers it was told to give and notes what it was asked."""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rkv_sglang.view.trace import Trace

INFO = {"model_path": "org/model", "tp_size": 1, "incremental_streaming_output": False}


class StandIn:
    """Answers by path: (status, content type, bytes) each, or what makes JSON of a request's decoded body.

    Attributes:
        url: Its address.
        asked: Decoded bodies of the requests that have one.
        keys: The bearer token of every request, None where there was none.
        api_key: What it wants; None for nothing.
    """

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str, bytes] | Callable[[Any], Any]] = {}
        self.asked: list[Any] = []
        self.keys: list[str | None] = []
        self.api_key: str | None = None
        self.url = ""

    def say(self, path: str, content: Any, status: int = 200) -> None:
        """Answer with JSON, or with bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.answers[path] = (status, "application/json", body)

    def stream(self, *events: Any, done: bool = True) -> None:
        """Answer ``/generate`` with server-sent events; bytes stand for a broken one."""
        lines = [b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) for event in events]
        self.answers["/generate"] = (200, "text/event-stream", b"\n\n".join([*lines, *([b"data: [DONE]"] * done), b""]))


class _Patient(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that has read enough may hang up before all is sent; what it prints is what tests look at.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    """Serve on 127.0.0.1 for the length of a ``with`` block."""
    told = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            told.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer(told.asked[-1])

        def _answer(self, asked: Any = None) -> None:
            sent = self.headers["Authorization"]
            told.keys.append(sent and sent.removeprefix("Bearer "))
            if told.keys[-1] != told.api_key:
                self.send_error(401)
                return
            answer = told.answers.get(self.path, (404, "text/html", b"<h1>nothing here</h1>"))
            if callable(answer):
                answer = (200, "application/json", json.dumps(answer(asked)).encode())
            status, kind, body = answer
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = _Patient(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def server_info(trace: Trace, **changes: Any) -> dict[str, Any]:
    """Return the part of ``/server_info`` that matters, for a server that would record this trace."""
    settings = {f"kv_{name}": getattr(trace, name) for name in ("budget", "buffer", "window")}
    return {**INFO, "model_path": trace.model, "kv_policy": trace.policy, **settings, **changes}


def events(trace: Trace, cuts: list[int], incremental: bool = False) -> list[dict[str, Any]]:
    """Return a stream's events that end after so many tokens each and after the last token.

    As a decoder does that sees one token at a time, they have U+FFFD for the parts of a character.
    """
    pieces = [text if text and text.isascii() else "\ufffd" for text in trace.tokens]
    found, before = [], 0
    for end in [*cuts, len(trace.tokens)]:
        start = before if incremental else 0
        before = end
        rows = [[-0.5, *row] for row in zip(trace.token_ids, pieces, strict=True)][start:end]
        meta_info = {"output_token_logprobs": rows, "finish_reason": None, "prompt_tokens": trace.prompt_len}
        found.append({"text": "".join(trace.tokens[start:end]), "meta_info": meta_info})
    recorded = {name: getattr(trace, name) for name in ("num_layers", "num_kv_heads", "compactions")}
    last = {"finish_reason": {"type": "length"}, "kv_policy": trace.policy, "kv_trace": recorded}
    found[-1]["meta_info"].update(last)
    return found
