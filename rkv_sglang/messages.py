"""Others' values and errors as messages repeat them: one line, of bounded length, whatever they are."""

from typing import Any

# Characters of a value, which may be a path, and of an error or a text.
MOST_SHOWN = 200
MOST_TOLD = 1000


def shown(value: Any) -> str:
    """Return a value as Python writes it; it may be of any type, size and depth."""
    try:
        text = one_line(repr(value))
    # Nested too deep, an integer of too many digits, or a class of somebody's whose repr fails.
    except Exception:
        return f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def one_line(value: Any) -> str:
    """Return the text of a value or an error in one line, without what a terminal would obey instead of show."""
    text = " ".join(str(value).split())
    if len(text) > MOST_TOLD:
        text = f"{text[:MOST_TOLD]}..."
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
