"""``rkv-sglang prefix``: what it asks of a server, and one line for every way it can fail."""

import socket
from typing import Any

import pytest

from rkv_sglang.cli import main
from rkv_sglang.client.prefixes import REPEAT
from rkv_sglang.client.tokens import with_front
from rkv_sglang.view.trace import read_trace
from tests.cache.trace_cases import random_history
from tests.view.stand_in import INFO, stand_in

FRONT, BEHIND = 1, 2
MADE = {"name": "hand book", "length": 12, "budget": 5}


def tokens_of(asked: dict[str, Any]) -> dict[str, Any]:
    """As a tokenizer that puts a special token on either side, and none of its others below 10."""
    plain = [10 + ord(character) for character in asked["prompt"]]
    return {"tokens": [FRONT, *plain, BEHIND] if asked["add_special_tokens"] else plain}


def ids_of(text: str) -> list[int]:
    return tokens_of({"prompt": text, "add_special_tokens": False})["tokens"]


@pytest.fixture
def server():
    with stand_in() as server:
        server.say("/server_info", {**INFO, "kv_policy": "rkv"})
        server.answers["/tokenize"] = tokens_of
        server.say("/generate", {"meta_info": {"finish_reason": {"type": "length"}, "kv_prefix": MADE}})
        yield server


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder, with the files of a prefix in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").write_bytes("\ufeffcold\r\nhands\n".encode())
    (tmp_path / "task.txt").write_text("Warm?")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    return tmp_path


CREATE = ["create", "--server", "URL", "--name", "hand book", "--document", "doc.txt", "--budget", "5"]
LIST, DELETE = ["list", "--server", "URL"], ["delete", "--server", "URL", "--name", "hand book"]


def ran(server, arguments: list[str]) -> int:
    return main(["prefix", *(server.url if argument == "URL" else argument for argument in arguments)])


def asked_of(server) -> dict[str, Any]:
    """Return the one request that was made for a prefix."""
    (asked,) = [body for body in server.asked if "input_ids" in body]
    return asked


@pytest.mark.parametrize(
    "flags, behind, judge",
    [
        (["--task", "task.txt"], ids_of("Warm?"), {}),
        (["--task", "task.txt", "--judge", "task"], ids_of("Warm?"), {"judge": "task"}),
        (["--no-task"], [*ids_of(REPEAT), FRONT, *ids_of("cold\r\nhands\n")], {"judge": "repeat"}),
    ],
    ids=["task", "judge", "no task"],
)
def test_a_document_and_what_judges_it_are_sent_as_tokens_with_the_special_ones_in_front_of_it(
    server, capsys, flags, behind, judge
):
    assert ran(server, [*CREATE, *flags]) == 0
    asked = asked_of(server)
    document = [FRONT, *ids_of("cold\r\nhands\n")]
    assert asked["input_ids"] == [*document, *behind]
    wish = {"create": "hand book", "length": len(document), "budget": 5, **judge}
    assert asked["sampling_params"]["custom_params"] == {"kv_prefix": wish}
    out, err = capsys.readouterr()
    assert out == 'hand book: 5 of 12 tokens; requests go on from it with custom_params {"kv_prefix": "hand book"}\n'
    assert err == ""


def test_what_is_kept_of_a_document_is_saved_as_a_trace(server, folder, rng, capsys):
    text = "cold\r\nhands\n"
    ids = [FRONT, *ids_of(text)]
    history = random_history(rng, num_layers=2, num_kv_heads=3, budget=5, buffer=len(ids) - 5, num_tokens=len(ids))
    server.say("/server_info", {**INFO, "kv_policy": "rkv", "kv_buffer": 4, "kv_window": 2})
    recorded = {"num_layers": 2, "num_kv_heads": 3, "compactions": [], "document": history.compactions[0]}
    meta_info = {"kv_prefix": MADE, "kv_policy": "rkv", "kv_trace": recorded}
    server.say("/generate", {"meta_info": meta_info})
    server.answers["/detokenize"] = lambda asked: {
        "text": ["".join("<s>" if token == FRONT else chr(token - 10) for token in part) for part in asked["tokens"]]
    }
    assert ran(server, [*CREATE, "--task", "task.txt", "--save-trace", "t.json"]) == 0
    assert asked_of(server)["sampling_params"]["custom_params"]["kv_trace"] is True
    trace = read_trace(folder / "t.json")
    assert (trace.subject, trace.tokens, trace.token_ids, trace.budget) == ("document", ["<s>", *text], ids, 5)
    (kept,) = trace.kept
    for layer, head in history.pairs:
        assert kept[layer, head].nonzero()[0].tolist() == history.held[0][layer, head]
    assert main(["view", "--trace", "t.json", "-o", "p.html"]) == 0
    assert capsys.readouterr().out.endswith("p.html: 5 of 13 tokens of the document (rkv)\n")
    # A server that records nothing says so itself; one that neither records nor refuses is told of here.
    del meta_info["kv_trace"]
    server.say("/generate", {"meta_info": meta_info})
    arguments = [*CREATE, "--task", "task.txt", "--save-trace", "u.json"]
    assert_refused(server, capsys, arguments, "recorded nothing: start it with --kv-policy rkv --kv-trace")
    assert_refused(server, capsys, [*arguments[:-1], "nowhere/t.json"], "nowhere/t.json cannot be written")


def test_prefixes_are_listed_a_line_each_and_deleted(server, capsys):
    others = [MADE, {**MADE, "name": "b", "judge": "repeat"}]
    for found, said in (
        (others, "hand book: 5 of 12 tokens\nb: 5 of 12 tokens, judged by repeat\n"),
        ([], "there are no named prefixes\n"),
    ):
        server.say("/generate", {"meta_info": {"kv_prefix": found}})
        assert ran(server, LIST) == 0
        assert capsys.readouterr().out == said
    server.asked.clear()
    server.say("/generate", {"meta_info": {"kv_prefix": {"deleted": "hand book"}}})
    assert ran(server, DELETE) == 0
    assert capsys.readouterr().out == "hand book is deleted\n"
    assert asked_of(server)["sampling_params"]["custom_params"] == {"kv_prefix": {"delete": "hand book"}}


def test_a_servers_key_goes_with_every_request(server, monkeypatch):
    monkeypatch.setenv("RKV_SGLANG_API_KEY", "kept secret")
    server.api_key = "kept secret"
    assert ran(server, [*CREATE, "--task", "task.txt"]) == 0
    assert set(server.keys) == {"kept secret"} and len(server.keys) == 5


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["list"], "list needs --server"),
        ([*LIST, "--name", "b"], "--name does not go with list"),
        ([*LIST, "--budget", "5"], "--budget does not go with list"),
        (DELETE[:3], "delete needs --name"),
        ([*DELETE, "--no-task"], "--no-task does not go with delete"),
        (CREATE[:5], "create needs --document and --budget"),
        (CREATE, "give either --task with a file, or --no-task"),
        ([*CREATE, "--task", "task.txt", "--no-task"], "give either --task with a file, or --no-task"),
        ([*CREATE, "--no-task", "--judge", "task"], "leave it out with --no-task"),
    ],
)
def test_flags_that_do_not_fit_give_one_line_and_2(server, capsys, arguments, said):
    assert_refused(server, capsys, arguments, said, status=2)
    assert server.keys == []


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([*CREATE, "--task", "missing.txt"], "--task missing.txt cannot be read (No such file"),
        ([*CREATE, "--task", "."], "--task . cannot be read (Is a directory)"),
        ([*CREATE, "--task", "empty.txt"], "--task empty.txt is empty: write some text"),
        ([*CREATE, "--no-task", "--document", "bytes.txt"], "--document bytes.txt cannot be read (it is not text"),
        ([*CREATE, "--no-task", "--document", "empty.txt"], "--document empty.txt is empty"),
        ([*DELETE[:-1], "caf\udce9"], "--name is not text in UTF-8"),
        (["list", "--server", "127.0.0.1:1"], "is no address: write http://127.0.0.1:1"),
    ],
)
def test_bad_input_gives_one_line_and_1_and_asks_nobody(server, capsys, arguments, said):
    assert_refused(server, capsys, arguments, said)
    assert server.keys == []


def test_what_is_no_such_server_gives_one_line_and_1(server, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert_refused(server, capsys, ["list", "--server", free], "is a server running there?")
    server.say("/server_info", {**INFO, "kv_policy": "none"})
    assert_refused(server, capsys, LIST, "has no policy, so it makes no prefixes: start it with --kv-policy rkv")
    server.say("/server_info", INFO)
    assert_refused(server, capsys, LIST, "has no policy")
    server.say("/server_info", {**INFO, "kv_policy": "rkv", "skip_tokenizer_init": True})
    assert_refused(server, capsys, [*CREATE, "--no-task"], "has no tokenizer: start it without --skip-tokenizer-init")
    server.api_key = "secret"
    assert_refused(server, capsys, LIST, "give --api-key, or the variable RKV_SGLANG_API_KEY")
    assert server.asked == []


def test_a_servers_refusal_is_passed_on_as_it_is(server, capsys):
    line = "kv_prefix budget 96 is not less than the length of 90 tokens, so nothing would be left out: set it lower"
    server.say("/generate", {"error": {"message": line}}, 400)
    assert_refused(server, capsys, [*CREATE, "--no-task"], f"the server refuses (status 400): {line}\n")
    aborted = {"finish_reason": {"type": "abort", "message": line}, "prompt_tokens": 1}
    server.say("/generate", {"meta_info": aborted})
    assert_refused(server, capsys, [*CREATE, "--no-task"], f"the server refuses: {line}\n")
    # This endpoint has another form of errors.
    server.say("/tokenize", {"object": "error", "message": "two\nlines", "code": 400}, 400)
    assert_refused(server, capsys, [*CREATE, "--no-task"], "the server refuses (status 400): two lines\n")


NO_SENSE = (
    *([], {}, 5, {"meta_info": {}}, {"meta_info": 5}, {"meta_info": {"kv_prefix": 5}}),
    *({"meta_info": {"kv_prefix": [5]}}, {"meta_info": {"finish_reason": 5, "kv_prefix": MADE}}, b"{"),
)


@pytest.mark.parametrize("answer", NO_SENSE)
def test_an_answer_that_makes_no_sense_gives_one_line_and_1(server, capsys, answer):
    server.say("/generate", answer)
    assert_refused(server, capsys, LIST, "rkv_sglang" if answer != b"{" else "its /generate is not JSON")
    server.say("/tokenize", answer)
    assert_refused(server, capsys, [*CREATE, "--no-task"], "/tokenize")


def test_no_tokens_of_a_text_are_lost_where_its_tokenizer_treats_its_beginning_otherwise():
    assert with_front([5, 6], [1, 5, 6, 2]) == [1, 5, 6]
    assert with_front([5, 6], [5, 6]) == [5, 6]
    assert with_front([5, 6], [1, 7]) == [1, 7]
    assert with_front([5, 6], [1, 50, 6]) == [1, 50, 6]


def test_a_name_may_be_of_any_alphabet(server):
    assert ran(server, [*DELETE[:-1], "Hände 🌟"]) == 0
    assert asked_of(server)["sampling_params"]["custom_params"] == {"kv_prefix": {"delete": "Hände 🌟"}}


def assert_refused(server, capsys, arguments: list[str], said: str, status: int = 1) -> None:
    capsys.readouterr()
    assert ran(server, arguments) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rkv-sglang prefix: ") and err.count("\n") == 1
    assert said in err, err
