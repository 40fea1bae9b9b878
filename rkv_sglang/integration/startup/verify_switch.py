"""The environment variable that has every compaction checked."""

import os

from rkv_sglang.config import HEAD, REQUEST

VERIFY_VARIABLE = "RKV_SGLANG_VERIFY"
_ON, _OFF = "1", ("", "0")


def is_verifying() -> bool:
    """Return whether every compaction is to be checked."""
    return os.environ.get(VERIFY_VARIABLE) == _ON


def verify_problem(granularity: str | None) -> str | None:
    """Return one line if the variable says neither yes nor no, or asks for what is not checked, else None.

    Args:
        granularity: The server's ``--kv-granularity``; None if its settings are bad.
    """
    value = os.environ.get(VERIFY_VARIABLE, "")
    if value == _ON and granularity == REQUEST:
        return f"{VERIFY_VARIABLE} checks --kv-granularity {HEAD} alone: unset it, or leave --kv-granularity out"
    if value == _ON or value in _OFF:
        return None
    return f"{VERIFY_VARIABLE} is {value[:80]!r}: set it to {_ON} to have every compaction checked, or unset it"
