"""Reservations against a simulated life of a request, token by token."""

from hypothesis import assume, example, given
from hypothesis import strategies as st

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.lengths import RequestState
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.prompt_plan import PromptPlan, can_compact_prompt, kept_of_prompt
from rkv_sglang.sizes.reservation import decode_growth, most_growth, prompt_budget_after, tokens_to_reserve

CONFIGS = st.builds(
    lambda window, more, buffer: PolicyConfig(window=window, budget=window + more, buffer=buffer),
    st.integers(1, 9),
    st.integers(1, 30),
    st.integers(1, 30),
)


def resident_lens(config: PolicyConfig, prompt_len: int, output_len: int, max_new_tokens: int) -> list[int]:
    """Return the length after the prefill of prompt and outputs, which gives one token more, and after every step."""
    resident, steps = prompt_len + output_len, 0
    lens = [resident]
    # The last token is never fed back.
    for _ in range(max_new_tokens - 1 - output_len):
        if resident - prompt_len >= config.capacity and steps >= config.window:
            resident = prompt_len + config.budget
        resident, steps = resident + 1, steps + 1
        lens.append(resident)
    return lens


@given(CONFIGS, st.integers(1, 50), st.integers(1, 150), st.integers(0, 120), st.integers(0, 150))
def test_growth_is_what_the_request_grows_by(config, prompt_len, max_new_tokens, output_len, step):
    output_len = min(output_len, max_new_tokens - 1)
    lens = resident_lens(config, prompt_len, output_len, max_new_tokens)
    step = min(step, len(lens) - 1)
    growth = decode_growth(
        config,
        prompt_len=prompt_len,
        resident_len=lens[step],
        # The prefill gave the first of them; every step since one more.
        tokens_left=max_new_tokens - (output_len + 1 + step),
        decode_steps=step,
    )
    assert growth == max(lens[step:]) - lens[step]


# As many tokens as its capacity and one more: too few for a compaction.
@example(PolicyConfig(window=4, budget=20, buffer=10), 7, 31, 0)
@given(CONFIGS, st.integers(1, 50), st.integers(1, 150), st.integers(0, 120))
def test_a_waiting_request_reserves_what_it_will_hold(config, prompt_len, max_new_tokens, output_len):
    output_len = min(output_len, max_new_tokens - 1)
    lens = resident_lens(config, prompt_len, output_len, max_new_tokens)
    reserved = tokens_to_reserve(config, output_len=output_len, max_new_tokens=max_new_tokens)
    needed = max(lens) - lens[0]
    # SGLang counts the last token too, which is never stored.
    assert needed <= reserved <= needed + 1
    if output_len == 0:
        assert reserved == min(max_new_tokens, config.capacity)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 400), st.sampled_from([1, 3, 16, 64]))
def test_what_fits_has_its_pages(num_prefill_tokens, num_growth_tokens, num_pages, page_size):
    pool_size = num_pages * page_size
    fits = num_growth_tokens <= most_growth(num_prefill_tokens, pool_size)
    assert fits == (ceil_to_page(num_prefill_tokens + num_growth_tokens, page_size) <= pool_size)


# Of a prompt that is compacted.


@st.composite
def with_prompts(draw):
    """Return settings, lengths of a request whose prompt will be compacted, and a page size."""
    window, buffer = draw(st.integers(1, 9)), draw(st.integers(1, 30))
    prompt_budget = 4 + window + draw(st.integers(1, 20))
    budget = window + draw(st.integers(1, 30))
    config = PolicyConfig(window=window, budget=budget, buffer=buffer, prompt_budget=prompt_budget)
    prompt_len = prompt_budget + draw(st.integers(1, 60))
    output_len = draw(st.integers(0, 90))
    max_new_tokens = output_len + window + draw(st.integers(2, 120))
    return config, prompt_len, output_len, max_new_tokens, draw(st.sampled_from([1, 3, 16]))


def slots_of_life(config, prompt_len, output_len, max_new_tokens, page_size):
    """Return of every moment of a request's life the tokens it holds, and the most slots that are taken for it then.

    What it has left of its prompt may stay in the tree, in whole pages, for as long as it runs.
    """
    held, own_prompt, steps = prompt_len + output_len, prompt_len, 0
    shared = 0
    life = [(held, held)]
    for _ in range(max_new_tokens - 1 - output_len):
        most = 0
        if own_prompt == prompt_len and steps >= config.window:
            plan = PromptPlan(prompt_len, held, config.prompt_budget)
            most = held + ceil_to_page(plan.kept_len, page_size)
            held, own_prompt = plan.kept_len, config.prompt_budget
            shared = prompt_len // page_size * page_size
        if held - own_prompt >= config.capacity and steps >= config.window:
            held = own_prompt + config.budget
        held, steps = held + 1, steps + 1
        life.append((held, max(most, shared + (ceil_to_page(held, page_size) if shared else held))))
    return life


@given(with_prompts(), st.integers(0, 9))
def test_growth_with_a_prompt_to_compact_holds_the_switch_and_all_that_follows(drawn, step):
    config, prompt_len, output_len, max_new_tokens, page_size = drawn
    step = min(step, config.window)
    assume(prompt_len // page_size > 0)
    life = slots_of_life(*drawn)
    growth = decode_growth(
        config,
        prompt_len=prompt_len,
        resident_len=life[step][0],
        tokens_left=max_new_tokens - (output_len + 1 + step),
        decode_steps=step,
        prompt_budget=config.prompt_budget,
        page_size=page_size,
    )
    assert growth == max(most for _, most in life[step:]) - life[step][0]


@given(with_prompts(), st.integers(0, 2000))
def test_a_prompt_is_compacted_exactly_where_the_pool_holds_both(drawn, num_pages):
    config, prompt_len, output_len, max_new_tokens, page_size = drawn
    assume(prompt_len // page_size > 0)
    pool_size = num_pages * page_size
    state = RequestState(prompt_len, max_new_tokens)
    needed = max(most for _, most in slots_of_life(*drawn))
    kept = prompt_budget_after(config, state, prompt_len + output_len, pool_size, page_size)
    assert kept in (0, config.prompt_budget)
    # SGLang counts the last token too, which is never stored.
    if kept:
        assert needed <= pool_size
    else:
        assert needed + page_size >= pool_size


@given(with_prompts())
def test_a_prompt_that_would_be_compacted_too_late_stays_whole(drawn):
    config, prompt_len, output_len, _, page_size = drawn
    # As many decode steps as fill the window, and none after.
    state = RequestState(prompt_len, output_len + config.window + 1)
    assert prompt_budget_after(config, state, prompt_len + output_len, 10**6, page_size) == 0
    assert not can_compact_prompt(config, config.prompt_budget, 10**6)
    assert can_compact_prompt(config, config.prompt_budget + 1, config.window + 2)


@given(st.integers(14, 400), st.integers(0, 60), st.data())
def test_a_prompts_plan_evicts_of_the_prompt_alone(prompt_len, generated_len, data):
    budget = data.draw(st.integers(13, prompt_len - 1))
    plan = PromptPlan(prompt_len, prompt_len + generated_len, budget)
    state = RequestState(prompt_len, 1000)
    state.record(plan)
    assert plan.kept_len == budget + generated_len == plan.of_scores.kept_len + generated_len
    assert plan.of_scores.generated_len == plan.resident_len
    assert (state.held_prompt_len, state.evicted_generated_tokens) == (budget, 0)
    assert state.logical_len(plan.kept_len) == prompt_len + generated_len
    assert state.generated_len(plan.kept_len) == generated_len
    state.forget_cache()
    assert state.held_prompt_len == prompt_len


@given(st.integers(1, 20), st.sampled_from([16, 32, 48]), st.integers(0, 60), st.integers(0, 300), st.integers(0, 40))
def test_of_a_prompt_in_blocks_some_may_be_chosen_and_its_ends_may_not(window, block, more, longer, generated_len):
    least = PolicyConfig(
        window=window, granularity="request", block=block, buffer=block, budget=500
    ).least_prompt_budget
    config = PolicyConfig(
        window=window, granularity="request", block=block, buffer=block, budget=500, prompt_budget=least + more
    )
    prompt_len = config.prompt_budget + longer
    assert can_compact_prompt(config, prompt_len, 10**6) == (longer >= block)
    kept = kept_of_prompt(config, prompt_len)
    assert config.prompt_budget <= kept < config.prompt_budget + block or kept == prompt_len
    plan = PromptPlan(prompt_len, prompt_len + generated_len, kept).of_blocks(window, block)
    assert plan.first_block * block >= 4 and plan.end_block * block <= prompt_len - window
    assert plan.num_dropped * block == plan.evicted_tokens == prompt_len - kept
    # There is a choice, and not always the same blocks go.
    assert 0 <= plan.num_dropped < plan.num_droppable
