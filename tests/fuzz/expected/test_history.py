"""What is said of named prefixes is judged by what was sent and answered before."""

from typing import Any

import pytest

from tests.fuzz.check import follows_stand_in
from tests.fuzz.expected.history import ENDED_BEFORE_ITS_GRAMMAR, History
from tests.fuzz.schedule import FuzzRequest, Schedule, rid_of
from tests.fuzz.test_fuzz import PROMPT, SERVER

MADE = {"create": "a", "length": len(PROMPT) - 1, "budget": 8, "judge": "task"}
REQUESTS = (
    FuzzRequest(prompt=PROMPT, max_new_tokens=1, prefix=MADE),
    FuzzRequest(prompt=(31,), max_new_tokens=1, after=0, prefix="a", params={"regex": "[a-d]{5,40}"}),
)


def problems_of(end: dict[str, Any], info: dict[str, Any]) -> list[str]:
    """Return what is wrong with the second request's end, whose prefix was made."""
    first, second = rid_of(0, 0), rid_of(0, 1)
    said = {"name": "a", **{name: MADE[name] for name in ("length", "budget", "judge")}}
    record = {
        "number": 0,
        "sent": {first: 0, second: 1},
        "ended": {first: 0, second: 2},
        "flushes": [],
        "outputs": {
            first: {"output_ids": [5], "finish_reason": {"type": "length", "length": 1}},
            second: {"output_ids": [0], "finish_reason": end},
        },
        "infos": {first: {"kv_prefix": said}, second: info},
    }
    return History(Schedule(seed=0, server=SERVER, requests=REQUESTS, events=()), record).problems


@pytest.mark.parametrize(
    ("end", "is_right"),
    [
        ({"type": "length", "length": 1}, False),
        # SGLang has it generate a token after another prompt.
        ({"type": "abort", "message": ENDED_BEFORE_ITS_GRAMMAR, "status_code": 400}, True),
        ({"type": "abort", "message": "another", "status_code": 400}, False),
        ({"type": "abort"}, True),
    ],
)
def test_an_answer_says_what_it_went_on_from_unless_it_was_ended_before(end: dict[str, Any], is_right: bool) -> None:
    assert bool(problems_of(end, {})) != is_right


@pytest.mark.parametrize(
    ("prefix", "prompt_len", "is_behind_one", "num_held", "is_stand_in"),
    [
        ("a", 5, False, 1, True),
        ("a", 1, False, 1, True),
        ("a", 1, True, 1, False),
        (MADE, 20, False, 1, True),
        (MADE, 20, False, 20, False),
        (None, 1, False, 1, False),
    ],
)
def test_what_was_refused_before_it_was_ended_follows_another_prompt(
    prefix: Any, prompt_len: int, is_behind_one: bool, num_held: int, is_stand_in: bool
) -> None:
    request = FuzzRequest(prompt=PROMPT[:prompt_len], max_new_tokens=4, prefix=prefix)
    maker = REQUESTS[0] if is_behind_one else None
    assert follows_stand_in(request, maker, prompt_len, {"kv_prompt_tokens": num_held}) == is_stand_in
