"""One call of a gRPC server, without a library for it: frames of HTTP/2 (RFC 9113) on a connection of its own."""

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GO_AWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4


def call_openai(port: int, method: str, body: dict[str, Any], timeout: float = 120.0) -> list[str]:
    """Send a JSON body to a method of SGLang's service that takes one, and return the messages it answers, as text.

    Raises:
        RuntimeError: The server reset the stream or ended the connection.
    """
    text = json.dumps(body).encode()
    # A protobuf message whose first field holds the text.
    message = b"\x0a" + _varint(len(text)) + text
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, b"")
            + _frame(_HEADERS, _END_HEADERS, 1, _headers(f"/sglang.runtime.v1.SglangService/{method}"))
            + _frame(_DATA, _END_STREAM, 1, b"\0" + struct.pack(">I", len(message)) + message)
        )
        found = b"".join(_answer(connection))
    messages = []
    while found:
        (length,) = struct.unpack(">I", found[1:5])
        messages.append(found[5 : 5 + length].decode(errors="replace"))
        found = found[5 + length :]
    return messages


def _answer(connection: socket.socket) -> Iterator[bytes]:
    """Yield what data frames hold, until the stream ends."""
    with connection.makefile("rb") as stream:
        while True:
            head = stream.read(9)
            if len(head) < 9:
                raise RuntimeError("the server ended the connection")
            length, kind, flags = int.from_bytes(head[:3]), head[3], head[4]
            payload = stream.read(length)
            if kind in (_RESET, _GO_AWAY):
                raise RuntimeError(f"the server gave up: {payload!r}")
            if kind == _DATA and length:
                yield payload
                # As much may come again, of the stream and of the connection.
                connection.sendall(b"".join(_frame(_WINDOW, 0, of, struct.pack(">I", length)) for of in (0, 1)))
            elif kind in (_SETTINGS, _PING) and not flags & _ACK:
                connection.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
            if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
                return


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _headers(path: str) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "127.0.0.1",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    # Each literal and not to be remembered (RFC 7541, 6.2.2); none is as long as 127 bytes.
    return b"".join(b"\0" + b"".join(bytes([len(word)]) + word.encode() for word in pair) for pair in fields.items())


def _varint(number: int) -> bytes:
    groups = []
    while True:
        number, low = number >> 7, number & 127
        groups.append(low | (128 if number else 0))
        if not number:
            return bytes(groups)
