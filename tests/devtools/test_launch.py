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


@pytest.mark.parametrize(("given", "expected"), [(None, "127.0.0.1,localhost"), ("a.b", "a.b,127.0.0.1,localhost")])
def test_a_server_warms_itself_up_past_any_proxy(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(name, given)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    environment = launch.server_environment("m")
    assert environment["no_proxy"] == environment["NO_PROXY"] == expected
    assert environment["http_proxy"] == "http://127.0.0.1:9"
