"""A file that a user names is read once, as it is, whatever stands behind its name, and never without end."""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.accuracy.problems import Problem, load_problems
from rkv_sglang.user_files import read_text, reason
from tests.support.once import served_once

CHARACTERS = "aZ0 \t\n\r\r\n\ufeff\u00fc\u20ac\U0001f31f\0{}\x7f"
FIFO_READER = """
import os, sys
from rkv_sglang.user_files import read_text
print(ascii(read_text(sys.argv[1])))
"""


def test_every_text_comes_back_as_it_is_but_for_a_mark_in_front(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "text"
    for _ in range(200):
        text = "".join(rng.choices(CHARACTERS, k=rng.randrange(40)))
        path.write_bytes(text.encode())
        assert read_text(path) == text.removeprefix("\ufeff")
        path.write_bytes(text.encode("utf-8-sig"))
        assert read_text(str(path)) == text


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 300_000])
def test_a_fifo_is_read_to_its_end_however_slowly_it_is_written(tmp_path: Path, rng: random.Random, size: int) -> None:
    text = "".join(rng.choices(CHARACTERS[:8], k=size))
    with served_once(tmp_path / "fifo", text.encode(), pauses=3) as path:
        assert read_text(path) == text


def test_a_shells_substitution_is_read(tmp_path: Path) -> None:
    script = tmp_path / "read.py"
    script.write_text(FIFO_READER)
    command = f"{sys.executable} {script} <(printf '\\xef\\xbb\\xbfa\\r\\nb')"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "'a\\r\\nb'\n"


@contextlib.contextmanager
def silent_fifo(path: Path, is_open: bool) -> Iterator[Path]:
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR) if is_open else None
    try:
        yield path
    finally:
        if writer is not None:
            os.close(writer)


@pytest.mark.parametrize("is_open", [False, True])
def test_a_fifo_through_which_nothing_comes_is_given_up(tmp_path: Path, is_open: bool) -> None:
    with silent_fifo(tmp_path / "fifo", is_open) as path, pytest.raises(TimeoutError) as caught:
        read_text(path, patience_s=0.05)
    assert reason(caught.value) == "nothing came through it for 0.05 s"


@pytest.mark.parametrize("name", ["/dev/zero", "file"])
def test_what_is_too_long_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"x" * 200_000)
    assert len(read_text("file", most_bytes=200_000)) == 200_000
    with pytest.raises(ValueError, match="longer than 199999 bytes"):
        read_text(name, most_bytes=199_999)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"\xff", "not text"), ("x".encode("utf-16"), "not text"), (b"\xed\xa0\x80", "not text")],
)
def test_other_bytes_are_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=why):
        read_text(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "why"),
    [("missing", "No such file"), (".", "Is a directory"), ("file/x", "Not a directory"), ("x" * 5000, "too long")],
)
def test_the_systems_reason_is_told(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:
        read_text(tmp_path / name)
    assert why in reason(caught.value)


def test_problems_may_begin_with_a_mark_and_come_through_a_fifo(tmp_path: Path) -> None:
    content = '\ufeff{"problem": "x\u2028y?", "answer": 33}\r\n'.encode()
    expected = [Problem("x\u2028y?", "33")]
    (tmp_path / "problems.jsonl").write_bytes(content)
    assert load_problems(str(tmp_path / "problems.jsonl")) == expected
    with served_once(tmp_path / "fifo.jsonl", content) as path:
        assert load_problems(str(path)) == expected
