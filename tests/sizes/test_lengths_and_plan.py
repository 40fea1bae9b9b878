"""Properties of the integer plan and of the schedule that leads to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.compaction_plan import plan_compaction
from rkv_sglang.sizes.lengths import NEVER, RequestState, can_ever_compact, decodes_again, steps_until_due

configs = st.builds(
    lambda window, above, buffer: PolicyConfig(window=window, budget=window + above, buffer=buffer),
    window=st.integers(1, 9),
    above=st.integers(1, 40),
    buffer=st.integers(1, 40),
)


@given(
    prompt_len=st.integers(0, 300), budget=st.integers(2, 200), excess=st.integers(1, 200), page_size=st.integers(1, 70)
)
def test_plan_frees_whole_pages_past_what_is_kept_and_nothing_else(prompt_len, budget, excess, page_size):
    plan = plan_compaction(
        prompt_len=prompt_len, resident_len=prompt_len + budget + excess, budget=budget, page_size=page_size
    )
    kept = set(range(plan.kept_len))
    freed = set(range(plan.freed_start, plan.freed_end))
    assert plan.kept_len == prompt_len + budget
    assert plan.evicted_tokens == excess
    assert kept.isdisjoint(freed)
    # A page goes back only if it is empty, and every page that is empty goes back.
    assert plan.freed_start % page_size == 0 and plan.freed_start - plan.kept_len < page_size
    assert plan.freed_end == plan.resident_len


@pytest.mark.parametrize("private_len", [0, 5, 10])
def test_plan_refuses_when_nothing_is_to_evict(private_len):
    with pytest.raises(ValueError, match="nothing to evict"):
        plan_compaction(prompt_len=3, resident_len=3 + private_len, budget=10, page_size=1)


def simulate(config: PolicyConfig, prompt_len: int, max_new_tokens: int, retract_after: int | None = None):
    """Decode one request step by step; return (step, private length) of each compaction, and the peak length."""
    state = RequestState(prompt_len, max_new_tokens)
    resident, decode_steps, outputs = prompt_len, 0, 1
    compactions = []
    peak = 0
    while outputs < max_new_tokens:
        if retract_after is not None and outputs == retract_after:
            state.forget_cache()
            # Everything but the newest token is prefilled again, and the prefill samples one more token.
            resident, decode_steps, retract_after = prompt_len + outputs, 0, None
            outputs += 1
            continue
        if decodes_again(state, resident) and not steps_until_due(config, prompt_len, resident, decode_steps):
            compactions.append((outputs - 1, resident - prompt_len))
            state.evicted_tokens += resident - prompt_len - config.budget
            resident = prompt_len + config.budget
        resident += 1
        decode_steps += 1
        outputs += 1
        peak = max(peak, resident - prompt_len)
        assert state.generated_len(resident) == outputs - 1
        assert state.logical_len(resident) == prompt_len + outputs - 1
    # Under overlap scheduling it is looked at once more, with its last token in flight.
    assert not decodes_again(state, resident)
    return compactions, peak


@given(config=configs, prompt_len=st.integers(1, 50), max_new_tokens=st.integers(1, 400))
def test_first_compaction_after_capacity_steps_then_every_buffer_steps(config, prompt_len, max_new_tokens):
    compactions, peak = simulate(config, prompt_len, max_new_tokens)
    # The step that a compaction comes before must exist: max_new_tokens take one decode step fewer.
    assert [step for step, _ in compactions] == list(range(config.capacity, max_new_tokens - 1, config.buffer))
    assert all(private == config.capacity for _, private in compactions)
    assert peak <= config.capacity
    assert can_ever_compact(config, max_new_tokens) == bool(compactions)


@given(config=configs, max_new_tokens=st.integers(2, 300), data=st.data())
def test_after_a_retraction_the_next_compaction_waits_for_a_window_of_queries(config, max_new_tokens, data):
    retract_after = data.draw(st.integers(1, max_new_tokens - 1))
    compactions, _ = simulate(config, 7, max_new_tokens, retract_after)
    later = [step for step, _ in compactions if step >= retract_after]
    expected = max(config.capacity, retract_after + config.window)
    if expected < max_new_tokens - 1:
        assert later[0] == expected
    else:
        assert later == []


@given(config=configs, prompt_len=st.integers(0, 60), private=st.integers(0, 400), decode_steps=st.integers(0, 400))
def test_steps_until_due_counts_down_by_one_a_step(config, prompt_len, private, decode_steps):
    steps = steps_until_due(config, prompt_len, prompt_len + private, decode_steps)
    after = steps_until_due(config, prompt_len, prompt_len + private + 1, decode_steps + 1)
    assert after == max(steps - 1, 0)
    assert (steps == 0) == (private >= config.capacity and decode_steps >= config.window)


def test_a_forgotten_cache_is_looked_at_again():
    state = RequestState(prompt_len=4, max_new_tokens=9, evicted_tokens=3, compactions=2, next_check=NEVER)
    state.forget_cache()
    assert (state.evicted_tokens, state.next_check, state.compactions) == (0, 0, 2)
