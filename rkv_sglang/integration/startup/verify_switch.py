"""The environment variable that has every compaction checked."""

import os

VERIFY_VARIABLE = "RKV_SGLANG_VERIFY"
_ON, _OFF = "1", ("", "0")


def is_verifying() -> bool:
    """Return whether every compaction is to be checked."""
    return os.environ.get(VERIFY_VARIABLE) == _ON


def verify_problem() -> str | None:
    """Return one line if the variable says neither yes nor no, else None."""
    value = os.environ.get(VERIFY_VARIABLE, "")
    if value == _ON or value in _OFF:
        return None
    return f"{VERIFY_VARIABLE} is {value[:80]!r}: set it to {_ON} to have every compaction checked, or unset it"
