"""Cut an answer's text into the texts of its tokens."""

from collections.abc import Sequence

# What a decoder writes for bytes that are no whole character.
PARTIAL = "\ufffd"


def token_texts(pieces: Sequence[str], text: str) -> list[str]:
    """Return what each token adds to the text.

    A token decoded alone lacks what its neighbours complete: the bytes of a character that spans several tokens, and in
    some vocabularies the space before a word. Characters that span tokens are spread evenly over the tokens that they
    take together, so in a long run of them a character may stand a token off; tokens left over are empty.

    Args:
        pieces: Every token decoded alone.
        text: All tokens decoded together.

    Returns:
        As many texts as pieces, together ``text``; or the pieces as they are, if the text is not made of them.
    """
    texts: list[str] = []
    partial: list[str] = []
    position = 0
    for piece in pieces:
        if PARTIAL in piece:
            partial.append(piece)
            continue
        start = text.find(piece, position + _least_length(partial))
        between = text[position:start]
        if start < 0 or (not partial and between not in ("", " ")):
            return list(pieces)
        if partial:
            texts += _spread(between, len(partial))
            partial, between = [], ""
        texts.append(between + piece)
        position = start + len(piece)
    rest = text[position:]
    if rest and not partial:
        return list(pieces)
    return texts + _spread(rest, len(partial))


def _least_length(partial: Sequence[str]) -> int:
    """Return how many characters tokens with partial characters stand for at least."""
    return sum(len(piece.replace(PARTIAL, "")) for piece in partial) + bool(partial)


def _spread(characters: str, num_tokens: int) -> list[str]:
    texts = [""] * num_tokens
    for number, character in enumerate(characters, start=1):
        texts[(number * num_tokens - 1) // len(characters)] += character
    return texts
