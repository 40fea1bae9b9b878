"""Named prefixes where no real scheduler is needed: what is asked, and servers that have none."""

import random
from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt import runtime_context
from sglang.srt.environ import envs

from rkv_sglang.config import JUDGES, PolicyConfig
from rkv_sglang.integration.runtime.parts import Parts
from rkv_sglang.integration.runtime.prefixes import room
from rkv_sglang.integration.runtime.prefixes.asked import (
    ACTIONS,
    Asked,
    asked_of,
    refuse_other_repeat,
    refuse_sizes,
)
from rkv_sglang.integration.runtime.prefixes.named import Prefix, made_by, used_by
from rkv_sglang.integration.runtime.prefixes.reading import read_prefix
from rkv_sglang.sizes.compaction_plan import block_of_pages
from rkv_sglang.sizes.prompt_plan import PrefixPlan
from tests.garbage.neighbours import MOST_LINE, any_value, neighbour

SERVER = PolicyConfig(policy="rkv", budget=32, buffer=16)
RIGHT: list[Any] = [
    "a",
    {"create": "a", "length": 100, "budget": 32},
    {"create": "a", "length": 100, "budget": 32, "judge": "repeat"},
    {"delete": "a"},
    {"list": True},
]


def parts_of(*, is_disabled: bool = False, attention_window: int = 0, is_latent: bool = False) -> Parts:
    pool = SimpleNamespace(kv_buffer=[]) if is_latent else SimpleNamespace(k_buffer=[0], v_buffer=[0])
    scheduler: Any = SimpleNamespace(
        tree_cache=SimpleNamespace(disable=is_disabled),
        waiting_queue=[],
        running_batch=SimpleNamespace(reqs=[]),
        chunked_req=None,
        max_total_num_tokens=4096,
        page_size=1,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
    )
    return Parts(scheduler=scheduler, scored=None, metrics=None, attention_window=attention_window)


def request(value: Any, **fields: Any) -> Any:
    """A request as far as is looked at it: of 120 tokens, and plain but for these fields."""
    plain = ("lora_id", "input_embeds", "positional_embed_overrides", "multimodal_inputs", "session", "beam_group")
    own = {
        "rid": "r",
        "sampling_params": SimpleNamespace(custom_params={"kv_prefix": value}, max_new_tokens=1),
        "origin_input_ids": array("q", range(3, 123)),
        "output_ids": [],
        "to_finish": None,
        "finished": lambda: False,
        **dict.fromkeys(plain),
    }
    assert fields.keys() <= own.keys()
    return SimpleNamespace(**{**own, **fields})


def test_whatever_is_asked_is_taken_or_refused_in_one_line(rng: random.Random):
    for _ in range(3000):
        value = rng.choice(RIGHT)
        value = neighbour(rng, value) if isinstance(value, str) else {**value, rng.choice([*value]): any_value(rng)}
        try:
            asked = asked_of({"kv_prefix": value})
            assert asked is not None and asked.action in (*ACTIONS, "use")
            if asked.action == "create":
                input_len = rng.randrange(1, 300)
                refuse_sizes(asked, input_len, SERVER, rng.choice((1, 16)))
                refuse_other_repeat(asked, [rng.randrange(2)] * input_len)
        except ValueError as error:
            line = str(error)
            assert line.startswith("kv_prefix ") and "\n" not in line and len(line) < MOST_LINE and line.isprintable()
        else:
            assert asked.action == "list" or asked.name


def test_a_prefix_that_can_be_made_leaves_something_out_and_chooses_something(rng: random.Random):
    accepted = {1: 0, 16: 0}
    for _ in range(3000):
        length, budget, input_len, page_size = (rng.randrange(1, most) for most in (200, 100, 250, 20))
        judge, server = rng.choice(JUDGES), SERVER
        if rng.random() < 0.5:
            block = block_of_pages(page_size)
            server = replace(SERVER, granularity="request", block=block, budget=100, buffer=block)
        asked = Asked("create", "a", length, budget, judge)
        try:
            refuse_sizes(asked, input_len, server, page_size)
        except ValueError:
            continue
        accepted[1 if server.block == 1 else 16] += 1
        num_judging = {"policy": SERVER.window, "task": 1, "repeat": length}[judge]
        kept = asked.num_kept(server)
        assert 4 + 1 + SERVER.window <= budget < length <= input_len - num_judging and kept % page_size == 0
        assert budget <= kept < min(length, budget + server.block)
        if server.block > 1:
            plan = PrefixPlan(length, input_len, kept).of_blocks(server.window, server.block)
            assert 0 < plan.num_dropped <= plan.num_droppable and length - kept == plan.num_dropped * server.block
    assert min(accepted.values()) > 5, accepted


def test_a_repeat_is_refused_unless_it_ends_with_the_document(rng: random.Random):
    document = [rng.randrange(5, 99) for _ in range(rng.randint(2, 30))]
    asked = Asked("create", "a", len(document), 2, "repeat")
    refuse_other_repeat(asked, [*document, *document])
    refuse_other_repeat(asked, array("q", [*document, 1, 2, 3, *document]))
    place = rng.randrange(len(document))
    other = [*document[:place], 3, *document[place + 1 :]]
    with pytest.raises(ValueError, match=f" of these token {place} is 3, in the document {document[place]}: "):
        refuse_other_repeat(asked, [*document, 7, *other])
    # Who judges otherwise may send what it likes.
    refuse_other_repeat(replace(asked, judge="task"), [*document, 7, *other])


def test_documents_are_judged_together_only_in_bounded_memory(monkeypatch):
    # 4 bytes for each of two layers and three heads.
    monkeypatch.setattr(room, "SCORE_BYTES", 24 * 150)
    keys = SimpleNamespace(num_layers=2, num_kv_heads=3)
    parts = replace(parts_of(), scored=SimpleNamespace(buffers=SimpleNamespace(keys=keys)))  # type: ignore[arg-type]
    asked = Asked("create", "a", 100, 32, "task")
    room.refuse_without_score_room(parts, asked)
    with pytest.raises(ValueError, match=r"numbers for 150 tokens at a time, and 0 are .*; set it to 150 or less, or"):
        room.refuse_without_score_room(parts, replace(asked, length=151))
    for rid, judge in (("b", "policy"), ("c", "repeat")):
        parts.prefixes.in_making[rid] = SimpleNamespace(length=51, judge=judge)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="150 tokens at a time, and 51 are being judged; ask again once they are"):
        room.refuse_without_score_room(parts, asked)
    room.refuse_without_score_room(parts, replace(asked, length=99))
    room.refuse_without_score_room(parts, replace(asked, judge="policy"))


def test_nothing_is_asked_where_the_field_is_not():
    assert asked_of(None) is None and asked_of({"kv_budget": 3}) is None


@pytest.mark.parametrize(
    "server, parts, parallel, mend",
    [
        (SERVER, {"is_disabled": True}, {}, "start it without --disable-radix-cache"),
        (SERVER, {"attention_window": 17}, {}, "leave kv_prefix out"),
        (replace(SERVER, granularity="request", block=16), {"is_latent": True}, {}, "leave kv_prefix out"),
        (SERVER, {}, {"tp_size": 2}, "start it with --tp-size 1 and --dp-size 1"),
        (SERVER, {}, {"dp_size": 2}, "start it with --tp-size 1 and --dp-size 1"),
    ],
    ids=["no radix", "window", "latent", "tp", "dp"],
)
@pytest.mark.parametrize("value", RIGHT, ids=["use", "create", "judged", "delete", "list"])
def test_servers_without_named_prefixes_say_so(monkeypatch, server, parts, parallel, mend, value):
    sizes = {"tp_size": 1, "dp_size": 1, "attn_tp_size": 1, **parallel}
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(**sizes))
    with pytest.raises(ValueError, match=f"^kv_prefix is not what this server can do: .*; {mend}$"):
        read_prefix(parts_of(**parts), request(value), server)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(tp_size=1, dp_size=1, attn_tp_size=1))


def make(parts: Parts, name: str) -> Prefix:
    """Make a prefix, as its request's prefill would."""
    maker = request({"create": name, "length": 100, "budget": 32})
    read_prefix(parts, maker, SERVER)
    prefix = made_by(maker)
    assert prefix is not None and not prefix.is_made
    parts.prefixes.made(prefix, maker.rid, lock=object())
    return prefix


# What no request may have that makes a prefix or goes on from one, and what the line calls it.
BESIDE = [
    ("lora_id", "a", "LoRA adapters"),
    ("input_embeds", [[0.5]], "input_embeds"),
    ("positional_embed_overrides", object(), "input_embeds"),
    ("multimodal_inputs", object(), "images"),
    ("session", object(), "sessions"),
    ("beam_group", object(), "beam searches"),
]


@pytest.mark.parametrize(("field", "thing", "named"), BESIDE, ids=[row[0] for row in BESIDE])
@pytest.mark.usefixtures("one_rank")
def test_what_does_not_go_with_a_prefix_is_refused_in_one_line_and_changes_nothing(field, thing, named):
    parts = parts_of()
    made = make(parts, "a")
    for value in ("a", *({"create": "b", "length": 100, "budget": 32, "judge": judge} for judge in JUDGES)):
        req = request(value, **{field: thing})
        with pytest.raises(ValueError, match=f"^kv_prefix does not go with {named}: leave one of them out$"):
            read_prefix(parts, req, SERVER)
        assert used_by(req) is None and made_by(req) is None and len(req.origin_input_ids) == 120
        assert parts.prefixes.all() == parts.prefixes.all_made() == [made]


@pytest.mark.usefixtures("one_rank")
def test_of_several_answers_to_one_prompt_one_alone_may_make_a_prefix():
    """With ``n`` above 1 SGLang sends the prompt once more, to cache it, and then each time as a request of its own."""
    parts, value = parts_of(), {"create": "a", "length": 100, "budget": 32}
    first, *others = (request(value, rid=f"r{number}") for number in range(3))
    read_prefix(parts, first, SERVER)
    (prefix,) = parts.prefixes.all()
    assert made_by(first) is prefix
    for state in ("is being made", "is there already"):
        for other in others:
            line = f"^kv_prefix 'a' {state}: take another name, or delete it first \\(kv_prefix: {{'delete': NAME}}\\)$"
            with pytest.raises(ValueError, match=line):
                read_prefix(parts, other, SERVER)
            assert made_by(other) is None and parts.prefixes.all() == [prefix]
        if not prefix.is_made:
            parts.prefixes.made(prefix, first.rid, lock=object())


@pytest.mark.usefixtures("one_rank")
def test_a_tree_that_is_never_asked_has_no_prefixes():
    with envs.SGLANG_RADIX_FORCE_MISS.override(True), pytest.raises(ValueError, match="SGLANG_RADIX_FORCE_MISS"):
        read_prefix(parts_of(), request("a"), SERVER)
