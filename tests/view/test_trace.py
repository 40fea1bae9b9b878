"""A trace file comes back equal, and whatever is not one is refused in one line."""

import base64
import json
import zlib

import pytest

from rkv_sglang.view.trace import FORMAT, read_trace, write_trace
from tests.cache.trace_cases import random_history
from tests.view.expected import trace_of


@pytest.fixture
def trace(rng):
    history = random_history(rng, num_layers=2, num_kv_heads=3, budget=9, buffer=4, num_tokens=40)
    return trace_of(history, rng, prompt="ü\ud83d\n</script>")


def test_what_is_written_is_read(tmp_path, trace):
    path = tmp_path / "a.json"
    write_trace(trace, path)
    assert read_trace(path) == trace
    content = json.loads(path.read_text())
    assert content["format"] == FORMAT
    # Traces that know of answers alone do not say what they are of.
    del content["subject"]
    path.write_text(json.dumps(content))
    assert read_trace(path) == trace


def test_totals_are_the_lengths_at_which_it_was_compacted(rng):
    history = random_history(rng, num_layers=1, num_kv_heads=1, budget=9, buffer=4, num_tokens=60, computed_again=(30,))
    assert trace_of(history, rng).totals == history.lengths


def refused(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_what_is_no_trace_is_refused(tmp_path, trace):
    path = tmp_path / "x.json"
    write_trace(trace, path)
    whole = path.read_bytes()
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, whole[: len(whole) // 2], [], 7, None, {"format": "other"}):
        assert "not a trace" in refused(path, content)
    with pytest.raises(ValueError, match="cannot be read"):
        read_trace(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_trace(tmp_path)
    good = json.loads(whole)
    assert "version 2" in refused(path, {**good, "version": 2})
    assert "policy" in refused(path, {name: value for name, value in good.items() if name != "policy"})
    assert "more" in refused(path, {**good, "more": 1})


@pytest.mark.parametrize(
    "field, value",
    [
        *(
            ("model", 3),
            ("subject", "question"),
            ("subject", ["answer"]),
            ("prompt", None),
            ("budget", 0),
            ("budget", 8),
            ("budget", True),
            ("budget", 1.5),
            ("budget", 10**40),
        ),
        *(
            ("num_layers", 3),
            ("num_layers", 0),
            ("num_layers", 2**31),
            ("num_kv_heads", 2**30),
            ("prompt_len", -1),
            ("prompt_len", True),
        ),
        *(("tokens", []), ("tokens", "abc"), ("tokens", ["a"] * 39), ("tokens", [1] * 40), ("token_ids", ["1"] * 40)),
        *(("compactions", {}), ("compactions", [1]), ("compactions", [{}])),
    ],
)
def test_a_field_that_cannot_be_is_refused(tmp_path, trace, field, value):
    path = tmp_path / "x.json"
    write_trace(trace, path)
    assert "cannot be shown" in refused(path, {**json.loads(path.read_text()), field: value})


@pytest.mark.parametrize(
    "key, value",
    [
        *(("kept", "!"), ("kept", "AAAA"), ("kept", ""), ("kept", 3), ("resident_len", 0), ("resident_len", "13")),
        *(("resident_len", 12), ("resident_len", 2**31), ("evicted_before", -1), ("evicted_before", 1)),
    ],
)
def test_a_damaged_compaction_is_refused(tmp_path, trace, key, value):
    path = tmp_path / "x.json"
    for place in (0, -1):
        write_trace(trace, path)
        content = json.loads(path.read_text())
        content["compactions"][place][key] = value
        refused(path, content)


def test_one_flipped_bit_of_what_was_kept_is_refused(tmp_path, trace, rng):
    path = tmp_path / "x.json"
    for place in range(len(trace.compactions)):
        write_trace(trace, path)
        content = json.loads(path.read_text())
        bits = bytearray(zlib.decompress(base64.b64decode(content["compactions"][place]["kept"])))
        bits[2 * rng.randrange(len(bits) // 2)] ^= 1 << rng.randrange(8)
        content["compactions"][place]["kept"] = base64.b64encode(zlib.compress(bytes(bits))).decode()
        assert "damaged" in refused(path, content)
