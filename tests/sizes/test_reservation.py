"""Reservations against a simulated life of a request, token by token."""

from hypothesis import example, given
from hypothesis import strategies as st

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.reservation import decode_growth, most_growth, tokens_to_reserve

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
