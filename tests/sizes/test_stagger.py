"""Head starts: where compactions then come, how evenly they spread, and that nobody holds more than without."""

import hashlib
from collections import Counter
from fractions import Fraction
from math import comb
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.lengths import RequestState, can_ever_compact, decodes_again, steps_until_due
from rkv_sglang.sizes.reservation import decode_growth
from rkv_sglang.sizes.stagger import NUM_HASHED_OUTPUTS, head_start, most_head_start

CONFIGS = st.builds(
    lambda window, above, buffer: PolicyConfig(window=window, budget=window + above, buffer=buffer, stagger=True),
    window=st.integers(1, 12),
    above=st.integers(1, 40),
    buffer=st.integers(1, 40),
)
IDS = st.lists(st.integers(0, 2**40), min_size=1, max_size=30)
OUTPUTS = st.lists(st.integers(0, 2**40), min_size=NUM_HASHED_OUTPUTS, max_size=40)


@given(CONFIGS, IDS, OUTPUTS)
def test_it_depends_on_the_prompt_and_the_first_outputs_only(config, prompt, outputs):
    start = head_start(config, prompt, outputs)
    assert start == head_start(config, prompt, outputs[:NUM_HASHED_OUTPUTS])
    before = head_start(config, prompt, outputs[: NUM_HASHED_OUTPUTS - 1])
    assert before == (0 if most_head_start(config) == 0 else None)
    assert start is not None and 0 <= start <= most_head_start(config) < config.buffer
    # Something is evicted, and the outputs that decide are resident before.
    assert config.capacity - start > config.budget
    assert start == 0 or config.capacity - start >= NUM_HASHED_OUTPUTS


def test_the_hash_is_the_one_that_is_documented():
    data = b"".join(number.to_bytes(8, "little", signed=True) for number in [7, 2**40, *range(16)])
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    assert head_start(PolicyConfig(), [7, 2**40], list(range(20))) == number % 128


def decode(config: PolicyConfig, prompt: list[int], outputs: list[int]) -> tuple[list[int], list[int]]:
    """Return the generated tokens resident before each compaction, and the steps that came before each."""
    state = RequestState(len(prompt), len(outputs))
    resident, lens, steps, start = len(prompt), [], [], 0
    # The newest output is not fed yet.
    for step in range(len(outputs) - 1):
        known = head_start(config, prompt, outputs[: step + 1])
        start = 0 if state.evicted_tokens else most_head_start(config) if known is None else known
        held = resident - len(prompt)
        left = len(outputs) - step - 1
        growth = decode_growth(
            config, prompt_len=len(prompt), resident_len=resident, tokens_left=left, decode_steps=step
        )
        assert held + growth <= config.capacity
        may_compact = can_ever_compact(config, len(outputs)) and decodes_again(state, resident)
        remaining = steps_until_due(config, len(prompt), resident, step, start)
        if may_compact and remaining <= config.window:
            # Whoever needs a query row holds, or has reserved, as much as there is a row for.
            assert held + growth >= config.capacity - config.window
        if may_compact and remaining == 0:
            assert known is not None
            lens.append(held)
            steps.append(step)
            state.evicted_tokens += held - config.budget
            resident = len(prompt) + config.budget
        resident += 1
    return lens, steps


@given(CONFIGS, IDS, st.integers(1, 200), st.integers(0, 2**32))
def test_only_the_first_compaction_is_early(config, prompt, num_outputs, seed):
    rng = Random(seed)
    outputs = [rng.randrange(1000) for _ in range(num_outputs)]
    lens, steps = decode(config, prompt, outputs)
    if not can_ever_compact(config, num_outputs):
        assert lens == []
        return
    start = head_start(config, prompt, outputs) or 0
    assert lens == [config.capacity - start] + [config.capacity] * (len(lens) - 1)
    assert steps == list(range(config.capacity - start, num_outputs - 1, config.buffer))


NUM_REQUESTS, BUFFER = 24, 32


def lockstep(rng: Random) -> Counter[int]:
    """Return of each step of a buffer how many of 24 requests that started together are due in it."""
    config = PolicyConfig(budget=128, buffer=BUFFER, stagger=True)
    starts = [
        head_start(config, [1, 2, 3], [rng.randrange(32000) for _ in range(NUM_HASHED_OUTPUTS)])
        for _ in range(NUM_REQUESTS)
    ]
    return Counter(start for start in starts if start is not None)


def chances() -> tuple[Fraction, Fraction]:
    """Return how likely 24 numbers of 32 put more than 5 in one place, and fill fewer than 12 places. Exact."""
    # Ways to put so many numbers into some of the places, at most 5 into each.
    few = [1] + [0] * NUM_REQUESTS
    for _ in range(BUFFER):
        few = [
            sum(few[put - more] * comb(put, more) for more in range(min(5, put) + 1)) for put in range(NUM_REQUESTS + 1)
        ]
    filled = [Fraction(1)] + [Fraction(0)] * NUM_REQUESTS
    for _ in range(NUM_REQUESTS):
        filled = [
            filled[count] * count / BUFFER + (filled[count - 1] * (BUFFER - count + 1) / BUFFER if count else 0)
            for count in range(NUM_REQUESTS + 1)
        ]
    return 1 - Fraction(few[NUM_REQUESTS], BUFFER**NUM_REQUESTS), sum(filled[:12], Fraction(0))


def test_a_crowd_spreads_as_evenly_as_chance_allows(rng):
    """No hash keeps every crowd at 5: one in four hundred has a step with more."""
    above_five, above_two_on_average = map(float, chances())
    assert 0.002 < above_five < 0.003 and above_two_on_average < 0.001
    crowds = [lockstep(rng) for _ in range(3000)]
    num_above = sum(max(crowd.values()) > 5 for crowd in crowds)
    # Seven standard deviations off would be a hash that is not even.
    assert num_above <= 3000 * above_five + 7 * (3000 * above_five) ** 0.5
    assert max(max(crowd.values()) for crowd in crowds) < 12
    averages = [NUM_REQUESTS / len(crowd) for crowd in crowds]
    assert sum(average > 2 for average in averages) <= 20
    assert 1.3 < sum(averages) / len(averages) < 1.5


@pytest.mark.parametrize("seed", range(5))
def test_these_crowds_are_at_most_five_in_a_step_and_two_on_average(seed):
    crowd = lockstep(Random(seed))
    assert max(crowd.values()) <= 5 and NUM_REQUESTS / len(crowd) <= 2
