"""What the start of a benchmark's server rests on."""

import contextlib
import socket

import pytest

from devtools import launch


def test_a_port_in_use_is_never_given_and_none_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    first = launch.free_port()
    second = launch.free_port()
    while second == first:
        second = launch.free_port()
    assert {first, second} <= set(launch.SERVER_PORTS)
    monkeypatch.setattr(launch, "SERVER_PORTS", [first, second])
    with contextlib.ExitStack() as held:
        held.enter_context(socket.create_server(("127.0.0.1", first)))
        assert {launch.free_port() for _ in range(20)} == {second}
        held.enter_context(socket.create_server(("127.0.0.1", second)))
        with pytest.raises(launch.ServerError, match="end old servers"):
            launch.free_port()
