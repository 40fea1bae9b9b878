"""What a request asks of the policy: strange containers, strange names, and names of others."""

import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.requests import FIELDS, config_for
from rkv_sglang.messages import MOST_SHOWN

SERVER = PolicyConfig(policy="rkv", budget=32, buffer=16)
BLOCKS = PolicyConfig(policy="rkv", granularity="request", budget=75, buffer=32, window=9, block=16)
POOL = 4096
NAMES = st.text(string.ascii_letters + string.digits + "_", max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES.filter(lambda value: value is not None and not isinstance(value, dict)))
def test_what_is_no_object_is_refused_in_one_line(value):
    with pytest.raises(ValueError, match=r"^custom_params must be a JSON object, .* or leave it out$"):
        config_for(value, SERVER, POOL)


@given(st.dictionaries(NAMES.filter(lambda name: not name.lower().startswith(("kv", "rkv"))), VALUES, max_size=5))
def test_names_of_others_are_left_alone_whatever_they_hold(custom_params):
    assert config_for(custom_params, SERVER, POOL) == SERVER
    assert config_for({**custom_params, "kv_budget": 64}, SERVER, POOL).budget == 64


@given(st.sampled_from(["kv_", "rkv_", "KV_", "Kv_"]), NAMES, VALUES)
def test_no_name_of_the_policys_kind_passes_unnoticed(prefix, rest, value):
    name = prefix + rest
    if name not in FIELDS:
        with pytest.raises(ValueError, match=r"^custom_params has no .*: it takes kv_policy, kv_budget") as caught:
            config_for({name: value}, SERVER, POOL)
        assert "\n" not in str(caught.value)


@given(st.sampled_from(FIELDS[:3]), VALUES)
def test_a_value_is_taken_or_refused_in_one_short_line(name, value):
    try:
        config = config_for({name: value}, SERVER, POOL)
    except ValueError as error:
        assert str(error).startswith((name, "kv_budget")) and "\n" not in str(error)
        assert len(str(error)) < MOST_SHOWN + 200
    else:
        assert config is None or (config.window < config.budget and config.capacity < POOL)


def test_a_prompt_that_this_server_cannot_compact_is_refused_in_one_line():
    why = "some of the model's layers attend to the latest 17 tokens, which must stay"
    with pytest.raises(ValueError, match=f"^kv_prompt_budget 40 is not what this server can do: {why}") as caught:
        config_for({"kv_prompt_budget": 40}, SERVER, POOL, 17)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("leave kv_prompt_budget out")
    # Asked to keep it whole, which it does.
    assert config_for({"kv_prompt_budget": 0}, SERVER, POOL, 17) == SERVER


def test_a_request_may_keep_its_prompt_whole_on_a_server_that_compacts_prompts():
    server = replace(SERVER, prompt_budget=50)
    assert config_for({}, server, POOL).prompt_budget == config_for(None, server, POOL).prompt_budget == 50
    assert config_for({"kv_prompt_budget": 0}, server, POOL).prompt_budget == 0
    assert config_for({"kv_prompt_budget": 13}, server, POOL).prompt_budget == 13
    # Two whole blocks beside the window.
    in_blocks = replace(SERVER, granularity="request", block=16)
    assert config_for({"kv_prompt_budget": 40}, in_blocks, POOL).prompt_budget == 40
    with pytest.raises(ValueError, match=r"^kv_prompt_budget 39 is neither 0 nor an integer of at least 40 "):
        config_for({"kv_prompt_budget": 39}, in_blocks, POOL)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kv_buffer": 17}, "kv_buffer 17 is no multiple of the 16 tokens that this server drops together: set it"),
        ({"kv_budget": 23}, "kv_budget 23 is not an integer of at least 24 (the window of 9 is kept inside"),
        ({"kv_granularity": "head"}, "custom_params has no 'kv_granularity': it takes kv_policy, kv_budget"),
        ({"kv_prompt_budget": 40}, "kv_prompt_budget 40 is neither 0 nor an integer of at least 41"),
    ],
)
def test_where_blocks_are_dropped_a_request_asks_for_whole_ones_and_the_granularity_is_the_servers(asked, message):
    with pytest.raises(ValueError) as caught:
        config_for(asked, BLOCKS, POOL)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    config = config_for({"kv_budget": 24, "kv_buffer": 48, "kv_prompt_budget": 41}, BLOCKS, POOL)
    assert config is not None and (config.budget, config.buffer, config.prompt_budget) == (24, 48, 41)
