"""Whatever requests come and go, what their prompts find takes no more memory than was taken off the pool."""

import random
from types import SimpleNamespace

import pytest
import torch

from rkv_sglang.cache.prompt_hits import PromptHitsRoom
from rkv_sglang.sizes.lengths import RequestState

NUM_LAYERS, NUM_KV_HEADS, CAPACITY, MOST_TOKENS = 3, 2, 40, 1000
# All that the room reads of a pool.
POOL = SimpleNamespace(
    keys=SimpleNamespace(num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, device=torch.device("cpu"))
)


def ask(room: PromptHitsRoom, state: RequestState):
    return room.hits_of(state, POOL, capacity=CAPACITY, most_tokens=MOST_TOKENS)


def test_no_schedule_takes_more_than_the_room_and_what_ends_is_free_again():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    room, running = PromptHitsRoom(is_used=True), []
    for _ in range(300):
        if running and rng.random() < 0.4:
            running.pop(rng.randrange(len(running)))
        state = RequestState(prompt_len=rng.randrange(1, 2 * MOST_TOKENS // 3), max_new_tokens=100)
        before, held = room.num_tokens, ask(room, state)
        fits = before + state.prompt_len <= MOST_TOKENS
        assert (held is not None) == (state.prompt_len > CAPACITY and fits)
        if held is not None:
            assert held.columns.shape == (NUM_LAYERS, NUM_KV_HEADS, state.prompt_len) and not held.is_filled
            assert state.prompt_hits is held
        running.append(state)
        assert room.num_tokens == sum(one.prompt_len for one in running if one.prompt_hits is not None) <= MOST_TOKENS
    running.clear()
    del state, held
    assert room.num_tokens == 0


def test_a_request_keeps_what_it_was_given_though_there_is_no_room_left():
    room = PromptHitsRoom(is_used=True)
    first, second = (RequestState(prompt_len=MOST_TOKENS, max_new_tokens=100) for _ in range(2))
    held = ask(room, first)
    assert held is not None and ask(room, second) is None and second.prompt_hits is None
    assert ask(room, first) is held and room.num_tokens == MOST_TOKENS


@pytest.mark.parametrize("prompt_len", [1, CAPACITY, CAPACITY + 1])
def test_a_policy_that_keeps_none_is_given_none(prompt_len):
    room = PromptHitsRoom(is_used=False)
    assert ask(room, RequestState(prompt_len=prompt_len, max_new_tokens=100)) is None and room.num_tokens == 0
