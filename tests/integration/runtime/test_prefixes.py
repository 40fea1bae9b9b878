"""Named prefixes where no real scheduler is needed: what is asked, and servers that have none."""

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt import runtime_context
from sglang.srt.environ import envs

from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.prefixes.asked import ACTIONS, Asked, asked_of, refuse_sizes
from rkv_sglang.integration.runtime.prefixes.reading import read_prefix
from tests.garbage.neighbours import MOST_LINE, any_value, neighbour

SERVER = PolicyConfig(policy="rkv", budget=32, buffer=16)
RIGHT: list[Any] = [
    "a",
    {"create": "a", "length": 100, "budget": 32},
    {"delete": "a"},
    {"list": True},
]


def parts_of(*, is_disabled: bool = False, attention_window: int = 0) -> Parts:
    scheduler: Any = SimpleNamespace(
        tree_cache=SimpleNamespace(disable=is_disabled), waiting_queue=[], max_total_num_tokens=4096, page_size=1
    )
    return Parts(scheduler=scheduler, scored=None, metrics=None, attention_window=attention_window)


def request(value: Any) -> Any:
    return SimpleNamespace(sampling_params=SimpleNamespace(custom_params={"kv_prefix": value}))


def test_whatever_is_asked_is_taken_or_refused_in_one_line(rng: random.Random):
    for _ in range(3000):
        value = rng.choice(RIGHT)
        value = neighbour(rng, value) if isinstance(value, str) else {**value, rng.choice([*value]): any_value(rng)}
        try:
            asked = asked_of({"kv_prefix": value})
            assert asked is not None and asked.action in (*ACTIONS, "use")
            if asked.action == "create":
                refuse_sizes(asked, rng.randrange(1, 200), SERVER, rng.choice((1, 16)))
        except ValueError as error:
            line = str(error)
            assert line.startswith("kv_prefix ") and "\n" not in line and len(line) < MOST_LINE and line.isprintable()
        else:
            assert asked.action == "list" or asked.name


def test_a_prefix_that_can_be_made_leaves_something_out_and_chooses_something(rng: random.Random):
    accepted = 0
    for _ in range(3000):
        length, budget, input_len, page_size = (rng.randrange(1, most) for most in (200, 100, 250, 20))
        try:
            refuse_sizes(Asked("create", "a", length, budget), input_len, SERVER, page_size)
        except ValueError:
            continue
        accepted += 1
        assert 4 + 1 + SERVER.window <= budget < length <= input_len - SERVER.window and budget % page_size == 0
    assert accepted > 30


def test_nothing_is_asked_where_the_field_is_not():
    assert asked_of(None) is None and asked_of({"kv_budget": 3}) is None


@pytest.mark.parametrize(
    "server, parts, parallel, mend",
    [
        (replace(SERVER, granularity="request", block=16), {}, {}, "start it with --kv-granularity head"),
        (SERVER, {"is_disabled": True}, {}, "start it without --disable-radix-cache"),
        (SERVER, {"attention_window": 17}, {}, "leave kv_prefix out"),
        (SERVER, {}, {"tp_size": 2}, "start it with --tp-size 1 and --dp-size 1"),
        (SERVER, {}, {"dp_size": 2}, "start it with --tp-size 1 and --dp-size 1"),
    ],
    ids=["request", "no radix", "window", "tp", "dp"],
)
@pytest.mark.parametrize("value", RIGHT, ids=["use", "create", "delete", "list"])
def test_servers_without_named_prefixes_say_so(monkeypatch, server, parts, parallel, mend, value):
    sizes = {"tp_size": 1, "dp_size": 1, "attn_tp_size": 1, **parallel}
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(**sizes))
    with pytest.raises(ValueError, match=f"^kv_prefix is not what this server can do: .*; {mend}$"):
        read_prefix(parts_of(**parts), request(value), server)


def test_a_tree_that_is_never_asked_has_no_prefixes(monkeypatch):
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(tp_size=1, dp_size=1, attn_tp_size=1))
    with envs.SGLANG_RADIX_FORCE_MISS.override(True), pytest.raises(ValueError, match="SGLANG_RADIX_FORCE_MISS"):
        read_prefix(parts_of(), request("a"), SERVER)
