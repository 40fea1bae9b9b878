"""Fixtures and reports that all tests share."""

import gc
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from devtools.launch import past_proxies

# Tests talk to servers on this machine, by clients that ask the environment.
os.environ.update(past_proxies())
# The models are tiny, and servers run beside the tests: more threads would only wait for each other.
torch.set_num_threads(1)
# What is imported stays: looking through it while more is imported takes a sixth of the time that a collection takes.
gc.disable()

# A file of these may take minutes; the rest evens out what is left between two workers.
_LONG_FOLDERS = ("tests/e2e/", "tests/support/harness/", "tests/integration/")

_SEED_VARIABLE = "RKV_TEST_SEED"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for this test, printed when it fails; ``RKV_TEST_SEED`` repeats a run."""
    given = os.environ.get(_SEED_VARIABLE)
    value = int(given) if given else random.SystemRandom().randrange(2**31)
    request.node.user_properties.append(("seed", value))
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A random generator on a fresh seed; see ``seed``."""
    return random.Random(seed)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files that take long come first, else one worker ends with them while the other has nothing to do."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG_FOLDERS))


def pytest_collection_finish() -> None:
    """From here on garbage is collected, among what the tests themselves make."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        for name, value in item.user_properties:
            if name == "seed":
                report.sections.append(("seed", f"repeat with {_SEED_VARIABLE}={value}"))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what tests have to report even if they pass: their property ``report``."""
    for outcome in terminalreporter.stats.get("passed", []):
        for name, text in getattr(outcome, "user_properties", []):
            if name == "report":
                terminalreporter.section(outcome.nodeid)
                terminalreporter.write_line(str(text))
