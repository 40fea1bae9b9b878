"""The command line writes a page, or one line of what is wrong and nothing else."""

import contextlib
import json
import os
import re

import pytest

from rkv_sglang.cli import main
from rkv_sglang.view.trace import read_trace, write_trace
from tests.cache.trace_cases import random_history
from tests.support.once import served_once
from tests.view.expected import trace_of
from tests.view.stand_in import events, server_info, stand_in


@pytest.fixture
def trace(rng):
    history = random_history(rng, num_layers=2, num_kv_heads=2, budget=9, buffer=4, num_tokens=40)
    return trace_of(history, rng, tokens=[*(f" {number}" for number in range(37)), "", "", "🌟"])


@pytest.fixture
def server(trace):
    with stand_in() as server:
        server.say("/server_info", server_info(trace))
        server.stream(*events(trace, [20]))
        yield server


@pytest.fixture
def folder(tmp_path, monkeypatch, trace):
    """The working folder, with two traces and a prompt in it."""
    monkeypatch.chdir(tmp_path)
    write_trace(trace, "a.json")
    write_trace(trace, "b.json")
    (tmp_path / "prompt.txt").write_text("What is it?\n")
    (tmp_path / "not.json").write_text("{}")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    return tmp_path


def embedded(page: str) -> list[dict]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def test_a_recording_is_shown_and_kept(folder, server, trace, capsys):
    arguments = ["--prompt-file", "prompt.txt", "--max-new-tokens", "40", "--save-trace", "t.json", "-o", "p.html"]
    assert main(["view", "--server", server.url, *arguments]) == 0
    assert read_trace("t.json") == trace
    out, err = capsys.readouterr()
    assert out == f"p.html: 40 tokens, {len(trace.compactions)} compactions (rkv)\n"
    assert err == ""
    (shown,) = embedded((folder / "p.html").read_text())
    assert (shown["tokens"], shown["totals"]) == (trace.tokens, trace.totals)


@pytest.mark.parametrize("flags", [[], ["--api-key", "given"]], ids=["variable", "flag"])
def test_a_servers_key_is_taken_from_a_variable_that_others_cannot_see_unless_a_flag_has_it(
    folder, server, monkeypatch, flags
):
    monkeypatch.setenv("RKV_SGLANG_API_KEY", "kept secret")
    server.api_key = "given" if flags else "kept secret"
    assert main(["view", "--server", server.url, "--prompt", "x", *flags]) == 0
    assert server.keys == [server.api_key] * 2


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_prompt_file_is_sent_as_it_is_but_for_a_mark_in_front(folder, server, mark):
    for name in ("file.txt", "fifo"):
        content = f"{mark}one\r\ntwo\n\r\x0b\ufeff".encode()
        if name == "fifo":
            served = served_once(folder / name, content)
        else:
            (folder / name).write_bytes(content)
            served = contextlib.nullcontext()
        with served:
            assert main(["view", "--server", server.url, "--prompt-file", name]) == 0
    assert [asked["text"] for asked in server.asked] == ["one\r\ntwo\n\r\x0b\ufeff"] * 2


def test_a_trace_may_begin_with_a_mark_and_come_through_a_fifo(folder, trace):
    content = b"\xef\xbb\xbf" + (folder / "a.json").read_bytes()
    with served_once(folder / "fifo", content):
        assert read_trace("fifo") == trace


def test_two_traces_are_shown_and_the_page_has_a_name_of_its_own(folder, capsys):
    assert main(["view", "--trace", "a.json", "--trace", "b.json"]) == 0
    assert len(embedded((folder / "kv-view.html").read_text())) == 2
    assert " and " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "either --server"),
        (["--server", "URL", "--trace", "a.json"], "either --server"),
        (["--trace", "a.json"] * 3, "two side by side"),
        (["--server", "URL"], "--prompt or --prompt-file"),
        (["--server", "URL", "--prompt", "x", "--prompt-file", "prompt.txt"], "--prompt or --prompt-file"),
        (["--trace", "a.json", "--prompt", "x"], "--prompt belongs to --server"),
        (["--trace", "a.json", "--prompt-budget", "5"], "--prompt-budget belongs to --server"),
        (["--trace", "a.json", "--save-trace", "c.json"], "--save-trace belongs to --server"),
        (["--trace", "a.json", "-o", "a.json"], "name another"),
        (["--server", "URL", "--prompt", "x", "--save-trace", "p.html", "-o", "./p.html"], "name another"),
    ],
)
def test_flags_that_do_not_fit_give_one_line_and_2(folder, server, capsys, arguments, said):
    assert_refused(folder, server, capsys, arguments, said, status=2)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--trace", "missing.json"], "missing.json cannot be read"),
        (["--trace", "not.json"], "not a trace"),
        (["--trace", "a.json", "--trace", "prompt.txt"], "prompt.txt is not a trace"),
        (["--trace", "a.json", "-o", "nowhere/p.html"], "nowhere/p.html cannot be written"),
        (["--trace", "a.json", "-o", "."], "cannot be written"),
        (["--server", "URL", "--prompt", "x", "--save-trace", "nowhere/t.json"], "nowhere/t.json cannot be written"),
        (["--server", "URL", "--prompt", ""], "prompt is empty"),
        (["--server", "URL", "--prompt-file", "empty.txt"], "prompt is empty"),
        (["--server", "URL", "--prompt", "caf\udce9"], "--prompt is not text in UTF-8"),
        (["--server", "URL", "--prompt-file", "missing.txt"], "missing.txt cannot be read"),
        (["--server", "URL", "--prompt-file", "bytes.txt"], "not text in UTF-8"),
        (["--server", "http://127.0.0.1:1", "--prompt", "x"], "is a server running there"),
        (["--server", "127.0.0.1:1", "--prompt", "x"], "no address"),
    ],
)
def test_bad_input_gives_one_line_and_1(folder, server, capsys, arguments, said):
    assert_refused(folder, server, capsys, arguments, said, status=1)
    assert server.asked == []


def test_a_server_that_refuses_gives_its_line_and_1(folder, server, capsys):
    server.say("/generate", {"error": {"message": "kv_trace is off on this server: start it with --kv-trace"}}, 400)
    arguments = ["--server", "URL", "--prompt", "x", "--save-trace", "t.json"]
    assert_refused(folder, server, capsys, arguments, "start it with --kv-trace", status=1)


def assert_refused(folder, server, capsys, arguments: list[str], said: str, status: int) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert main(["view", *(server.url if argument == "URL" else argument for argument in arguments)]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rkv-sglang view: ") and err.count("\n") == 1
    assert said in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_file_that_is_not_ours_to_write(folder, server, capsys):
    (folder / "p.html").write_text("")
    (folder / "p.html").chmod(0o400)
    assert_refused(folder, server, capsys, ["--trace", "a.json", "-o", "p.html"], "cannot be written", status=1)
