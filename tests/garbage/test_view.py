"""Garbage in what ``view`` reads, traces and a server's answers: a page comes out, or one line."""

import base64
import io
import json
import random
import tracemalloc
import urllib.error
import zlib
from email.message import Message
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from rkv_sglang.client import server as client
from rkv_sglang.view.page import page_html
from rkv_sglang.view.record import record
from rkv_sglang.view.trace import Trace, read_trace, write_trace
from tests.cache.trace_cases import random_history
from tests.garbage.neighbours import assert_flat, assert_one_line, damaged, mutated
from tests.view.expected import trace_of
from tests.view.stand_in import events, server_info


@pytest.fixture
def trace(rng: random.Random) -> Trace:
    history = random_history(rng, num_layers=2, num_kv_heads=2, budget=5, buffer=3, num_tokens=17)
    return trace_of(history, rng)


def test_a_trace_is_shown_or_refused_in_one_line(tmp_path: Path, trace: Trace, rng: random.Random) -> None:
    path = tmp_path / "t.json"
    write_trace(trace, path)
    right = path.read_bytes()
    content = json.loads(right)

    def some() -> None:
        changed = json.dumps(mutated(rng, content)).encode() if rng.random() < 0.7 else damaged(rng, right)
        path.write_bytes(changed)
        try:
            found = read_trace(path)
        except ValueError as error:
            assert_one_line(str(error))
        else:
            assert page_html([found])

    assert_flat(some, times=400)


def test_bits_that_unpack_to_more_than_they_should_are_never_unpacked_whole(tmp_path: Path, trace: Trace) -> None:
    path = tmp_path / "t.json"
    write_trace(trace, path)
    content = json.loads(path.read_text())
    # A quarter of a gigabyte in as many kilobytes.
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**24)) for _ in range(16)) + packer.flush()
    content["compactions"][0]["kept"] = base64.b64encode(packed).decode()
    path.write_text(json.dumps(content))

    def refused() -> None:
        with pytest.raises(ValueError, match="damaged") as caught:
            read_trace(path)
        assert_one_line(str(caught.value))

    tracemalloc.start()
    try:
        refused()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**24


def test_a_servers_answers_are_a_trace_or_one_line(
    monkeypatch: pytest.MonkeyPatch, trace: Trace, rng: random.Random
) -> None:
    info = server_info(trace)
    stream = events(trace, [3, 9])
    lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in stream] + [b"data: [DONE]\n\n"]

    def body(content: bytes) -> Any:
        kind = rng.random()
        if kind < 0.9:
            return io.BytesIO(content)
        headers = Message()
        status = rng.choice((400, 401, 403, 404, 429, 500, 503))
        raise rng.choice(
            (
                urllib.error.HTTPError("u", status, rng.choice(("x", "", "a\nb", None)), headers, io.BytesIO(content)),
                urllib.error.URLError(rng.choice((TimeoutError("t"), "a\nb", OSError(5, "x")))),
                TimeoutError("timed\nout"),
                IncompleteRead(b"x"),
                ConnectionResetError(),
            )
        )

    def open_url(url: str, **asked: Any) -> Any:
        if url.endswith("/server_info"):
            right = json.dumps(info).encode()
            changed = json.dumps(mutated(rng, info)).encode() if rng.random() < 0.4 else right
            return body(damaged(rng, changed) if rng.random() < 0.1 else changed)
        changed_lines = list(lines)
        if rng.random() < 0.8:
            at = rng.randrange(len(stream))
            changed_lines[at] = b"data: " + json.dumps(mutated(rng, stream[at])).encode() + b"\n\n"
        content = b"".join(changed_lines)
        return body(damaged(rng, content) if rng.random() < 0.3 else content)

    monkeypatch.setattr(client, "open_url", open_url)
    outcomes: list[bool] = []

    def some() -> None:
        try:
            found = record("http://127.0.0.1:1", "What is it?", max_new_tokens=17, temperature=0)
        except ValueError as error:
            assert_one_line(str(error))
            outcomes.append(False)
        else:
            assert page_html([found])
            outcomes.append(True)

    assert_flat(some, times=400)
    # Both kinds were among them.
    assert len(set(outcomes)) == 2
