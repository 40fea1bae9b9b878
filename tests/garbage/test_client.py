"""Garbage in what a server answers to ``rkv-sglang prefix``: lines come out, or one line of what is wrong."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rkv_sglang.cache.trace import pack_compaction
from rkv_sglang.cli import main
from rkv_sglang.client import server as client
from rkv_sglang.view.trace import read_trace
from tests.garbage.neighbours import assert_flat, assert_one_line, damaged, mutated

PREFIX = {"name": "b", "length": 3, "budget": 2, "judge": "repeat"}
KEPT = pack_compaction([[[0, 2]]], resident_len=3, evicted_before=0)
TRACE = {"num_layers": 1, "num_kv_heads": 1, "compactions": [], "document": KEPT}
INFO = {"model_path": "m", "kv_policy": "rkv", "kv_buffer": 8, "kv_window": 1, "tp_size": 1}
META_INFO = {"finish_reason": {"type": "length"}, "kv_policy": "rkv", "kv_prefix": PREFIX, "kv_trace": TRACE}
RIGHT: dict[str, Any] = {
    "/server_info": {**INFO, "skip_tokenizer_init": False},
    "/tokenize": {"tokens": [5, 6, 7], "count": 3, "max_model_len": 100},
    "/detokenize": {"text": ["a", "b", "c", "abc"]},
    "/generate": {"meta_info": META_INFO, "output_ids": [1]},
}


def test_a_servers_answers_are_lines_about_prefixes_or_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: random.Random
) -> None:
    (tmp_path / "doc").write_text("some")
    files = ["--task", str(tmp_path / "doc"), "--document", str(tmp_path / "doc")]

    def open_url(url: str, **asked: Any) -> Any:
        path = url.removeprefix("http://127.0.0.1:1")
        answer = RIGHT[path]
        if path == "/generate" and b'"list"' in asked["body"]:
            answer = {"meta_info": {**answer["meta_info"], "kv_prefix": [PREFIX, PREFIX]}}
        content = json.dumps(mutated(rng, answer) if rng.random() < 0.5 else answer).encode()
        return io.BytesIO(damaged(rng, content) if rng.random() < 0.1 else content)

    monkeypatch.setattr(client, "open_url", open_url)
    outcomes: set[int] = set()

    def some() -> None:
        flags = rng.choice(
            (
                ["list"],
                ["delete", "--name", "b"],
                ["create", "--name", "b", "--budget", "2", "--no-task", "--document", str(tmp_path / "doc")],
                ["create", "--name", "b", "--budget", "2", *files, "--save-trace", str(tmp_path / "trace")],
            )
        )
        status = main(["prefix", *flags, "--server", "http://127.0.0.1:1"])
        out, err = capsys.readouterr()
        if status:
            assert_one_line(err.removesuffix("\n"))
            assert out == ""
        else:
            if "--save-trace" in flags:
                assert read_trace(tmp_path / "trace").subject == "document"
            assert err == "" and out.removesuffix("\n").replace("\n", "").isprintable()
        outcomes.add(status)

    assert_flat(some, times=300)
    assert outcomes == {0, 1}
