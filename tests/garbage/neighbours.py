"""Values near a right one: of other types, sizes, depths and encodings. What must hold for all of them is here too."""

import copy
import gc
import json
import logging
import os
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

# Bytes that a thousand calls may leave behind: caches of the standard library fill, and Python's lists grow in steps.
MOST_GROWTH = 300_000
MOST_LINE = 2000

INTEGERS = (0, 1, -1, 2, 7, 8, 9, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**40)
FLOATS = (0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    *("", " ", "none", "None", "rkv", "1", "-1", "1.0", "true", "null", "{}", "[]", "kv_policy", "x" * 10_000),
    *("a\nb", "a\r\nb", "\0", "\ufeff1", "\u2028", "\u202e", "\U0001f31f", "\ud83d", "\u0661", "%s", "{0}", "../x"),
)
# What requests may say in ``kv_prefix``.
PREFIX_WISHES: tuple[Any, ...] = (
    "a",
    {"create": "a", "length": 100, "budget": 32},
    {"create": "a", "length": 100, "budget": 32, "judge": "repeat"},
    {"delete": "a"},
    {"list": True},
)


def nested(depth: int, value: Any = None) -> Any:
    """Return a value inside so many lists and objects."""
    for level in range(depth):
        value = [value] if level % 2 else {"x": value}
    return value


def containers(rng: random.Random) -> Any:
    return rng.choice(
        (
            *([], {}, [[]], [None] * 100, {"": {}}, {"\ud83d\n": 1}, {str(i): i for i in range(300)}),
            nested(rng.choice((3, 40, 150))),
        )
    )


def any_value(rng: random.Random) -> Any:
    """Return a value as JSON can hold it, of any kind."""
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice((None, True, False)),
        lambda: rng.choice(INTEGERS) * rng.choice((1, -1)),
        lambda: rng.choice(FLOATS),
        lambda: rng.choice(TEXTS),
        lambda: containers(rng),
    )
    return rng.choice(kinds)()


def neighbour(rng: random.Random, value: Any) -> Any:
    """Return something near ``value``: often of its type, and else of any."""
    if isinstance(value, bool) or value is None or rng.random() < 0.4:
        return any_value(rng)
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 10**9, float(value), str(value), [value], value == 1))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e300, str(value), [value], *FLOATS))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice((value[:at], value[at:] + value[:at], value[:at] + rng.choice(TEXTS) + value[at:], [value]))
    return containers(rng)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) inside a document of JSON."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [place for key, value in items for place in [(document, key), *places(value)]]


def mutated(rng: random.Random, document: Any, most: int = 3) -> Any:
    """Return a copy with up to ``most`` of its places changed, dropped, renamed, or said twice."""
    found = copy.deepcopy(document)
    for _ in range(rng.randint(1, most)):
        inside = places(found)
        if not inside or rng.random() < 0.03:
            return neighbour(rng, found)
        container, key = rng.choice(inside)
        change = rng.randrange(4)
        if change == 0:
            del container[key]
        elif change == 1 and isinstance(container, dict):
            container[rng.choice((f"{key}s", key[1:], key.upper(), *TEXTS))] = container.pop(key)
        elif change == 1:
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = neighbour(rng, container[key])
    # Only what JSON can hold has keys of text.
    return json.loads(json.dumps(found, skipkeys=True))


def with_wish(rng: random.Random, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a request's settings as they are, or with a wish about named prefixes instead of those of its prompt."""
    if rng.random() < 0.5:
        return settings
    others = {name: value for name, value in settings.items() if not name.startswith("kv_prompt_")}
    return {**others, "kv_prefix": rng.choice(PREFIX_WISHES)}


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with a few of them changed, cut, doubled or put in another encoding."""
    change = rng.randrange(6)
    at, end = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    if change == 0:
        return content[:at]
    if change == 1:
        return content[:at] + content[end:]
    if change == 2:
        return content[:end] + content[at:]
    if change == 3:
        return content[:at] + rng.randbytes(rng.randrange(9)) + content[at:]
    if change == 4:
        return content.decode("latin-1").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")))
    return rng.randbytes(rng.randrange(300))


def assert_one_line(message: str) -> None:
    """Assert that a message is one readable line of bounded length."""
    assert message.strip() and len(message) <= MOST_LINE, (len(message), message[:200])
    assert len(message.splitlines()) == 1, message


def assert_flat(call: Callable[[], Any], times: int = 1000) -> None:
    """Call so many times, and assert that memory does not grow; ``RKV_TEST_FULL_MATRIX=1``: 1,000 times at least.

    A table of the interpreter that doubles once is no leak: what leaks grows in each of three rounds. Nothing is logged
    meanwhile: pytest keeps what is until the test ends.
    """
    if os.environ.get("RKV_TEST_FULL_MATRIX"):
        times = max(times, 1000)
    for _ in range(times // 5):
        call()
    growth = []
    logging.disable()
    tracemalloc.start()
    try:
        while len(growth) < 3:
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(times):
                call()
            gc.collect()
            growth.append(tracemalloc.get_traced_memory()[0] - before)
            if growth[-1] < MOST_GROWTH:
                return
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    raise AssertionError(f"{growth} bytes more after {times} calls each")
