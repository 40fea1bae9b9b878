"""The texts of tokens join to the answer's text, and a character of several tokens is not lost."""

import pytest

from rkv_sglang.view.token_text import token_texts

ALPHABET = "ab .\nä質🌟é"


def cut(rng, data: bytes) -> list[bytes]:
    places = sorted(rng.sample(range(1, len(data)), rng.randint(0, len(data) - 1)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@pytest.mark.parametrize(
    "pieces, text, expected",
    [
        (["Hello", " world", "."], "Hello world.", ["Hello", " world", "."]),
        (["\ufffd", "\ufffd", "\ufffd", "!"], "🌟!", ["", "", "🌟", "!"]),
        ([" \ufffd", "\ufffd", " x"], " é x", [" ", "é", " x"]),
        ([" \ufffd", "\ufffd", " "], " é ", [" ", "é", " "]),
        (["\ufffd"] * 6, "🌟🚀", ["", "", "🌟", "", "", "🚀"]),
        (["Hel", "lo", "world"], "Hello world", ["Hel", "lo", " world"]),
        (["a", "\ufffd"], "a\ufffd", ["a", "\ufffd"]),
        (["a", "b"], "something else", ["a", "b"]),
        (["a", "b"], "abc", ["a", "b"]),
        ([], "", []),
    ],
)
def test_by_hand(pieces, text, expected):
    assert token_texts(pieces, text) == expected


def test_whole_characters_stay_where_they_are(rng):
    for _ in range(200):
        pieces = ["".join(rng.choices(ALPHABET, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 30))]
        assert token_texts(pieces, "".join(pieces)) == pieces


def test_any_cut_of_the_bytes_joins_to_the_text_and_splits_no_certain_token(rng):
    joined = 0
    for _ in range(400):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(2, 20)))
        parts = cut(rng, text.encode())
        pieces = [part.decode(errors="replace") for part in parts]
        texts = token_texts(pieces, text)
        assert len(texts) == len(pieces)
        if texts == pieces:
            continue
        joined += 1
        assert "".join(texts) == text
        for piece, found in zip(pieces, texts, strict=True):
            assert "\ufffd" in piece or found in (piece, " " + piece)
    assert joined > 200
