"""Where these tests say something: on a CPU."""

import pytest

from tests.support.harness.environment import ORACLE_APPLIES, WHY_NOT


@pytest.fixture(scope="session", autouse=True)
def oracle_applies() -> None:
    """Skip where answers could not be held against the oracle's."""
    if not ORACLE_APPLIES:
        pytest.skip(WHY_NOT)
