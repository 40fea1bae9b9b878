"""Others' values and errors as messages repeat them: one line, of bounded length, whatever they are."""

from typing import Any

# Characters of a value.
MOST_SHOWN = 80


def shown(value: Any) -> str:
    """Return a value as it stands in a message; it may be of any type, size and depth."""
    try:
        text = one_line(repr(value))
    # Nested too deep, an integer of too many digits, or a class of somebody's whose repr fails.
    except Exception:
        return f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def one_line(value: Any) -> str:
    """Return the text of a value or an error in one line."""
    return " ".join(str(value).split())
