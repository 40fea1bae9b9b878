"""The plan's arithmetic: bytes add up, and its counts are the largest that fit."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.lengths import RequestState
from rkv_sglang.sizes.memory_plan import ModelShape, pool_tokens, requests_at_once
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.reservation import prompt_budget_after, tokens_to_reserve

LLAMA_8B = ModelShape(
    num_layers=32, num_qo_heads=32, num_kv_heads=8, head_dim=128, v_head_dim=128, kv_itemsize=2, query_itemsize=2
)


def test_llama_8b_by_hand():
    assert LLAMA_8B.kv_bytes == 131072
    # A row of queries is 32 layers x 8 steps x 32 heads x 128 x 2 bytes = 2 MiB, one for every 1144 tokens.
    assert LLAMA_8B.side_bytes(PolicyConfig()) == 2 * 2**20 / 1144
    # A stateful policy carries 1016 scores for each of 32 x 8 heads and 1152 tokens.
    carried = LLAMA_8B.side_bytes(PolicyConfig(), stateful=True) - LLAMA_8B.side_bytes(PolicyConfig())
    assert abs(carried - 256 * 4 * 1016 / 1152) < 1e-9
    # One that remembers 28 queries of each of 32 layers and 32 heads carries 28 * 32 * 32 * 128 numbers of 2 bytes.
    carried = LLAMA_8B.side_bytes(PolicyConfig(), memory_numbers=28 * 4 * 128) - LLAMA_8B.side_bytes(PolicyConfig())
    assert abs(carried - 2 * 28 * 32 * 32 * 128 / 1152) < 1e-9
    # What is observed is carried once, by all layers and heads together.
    carried = LLAMA_8B.side_bytes(PolicyConfig(), observed_numbers=5085) - LLAMA_8B.side_bytes(PolicyConfig())
    assert abs(carried - 8 * 5085 / 1152) < 1e-9
    # Three numbers for each of 64 pairs of 32 x 32 heads, twice.
    assert LLAMA_8B.statistics_bytes == 2 * 3 * 4 * 64 * 1024
    pool = pool_tokens(LLAMA_8B, 8 * 2**30, None)
    assert pool == 65536
    assert requests_at_once(pool, prompt_len=512, output_len=16384) == 3
    assert requests_at_once(pool, prompt_len=512, output_len=16384, config=PolicyConfig()) == 65536 // 1664


@given(
    st.integers(1, 5000),
    st.integers(1, 300),
    st.integers(1, 900),
    st.sampled_from([1, 16, 64]),
    st.none() | st.builds(lambda b: PolicyConfig(budget=b, buffer=16), st.integers(9, 200)),
)
def test_the_count_is_the_largest_that_fits(num_pages, prompt_len, output_len, page_size, config):
    pool = num_pages * page_size
    held = prompt_len + (output_len if config is None else min(output_len, config.budget + config.buffer))
    count = requests_at_once(pool, prompt_len=prompt_len, output_len=output_len, page_size=page_size, config=config)
    assert count * ceil_to_page(held, page_size) <= pool
    # Without a policy one more may fit by its tokens, if it fills the pool to its last page.
    spare = 2 * page_size if config is None else -1
    assert (count + 1) * ceil_to_page(held, page_size) + spare >= pool


@given(st.integers(1, 400), st.integers(30, 300), st.integers(12, 900), st.sampled_from([1, 16]))
def test_with_prompts_compacted_the_last_one_to_come_still_finds_room_for_its_own(
    num_pages, prompt_len, output_len, page_size
):
    pool, config = num_pages * page_size, PolicyConfig(budget=20, buffer=16, prompt_budget=14)
    sizes = {"prompt_len": prompt_len, "output_len": output_len, "page_size": page_size}
    count = requests_at_once(pool, **sizes, config=config)
    whole = requests_at_once(pool, **sizes, config=replace(config, prompt_budget=0))
    if not prompt_budget_after(config, RequestState(prompt_len, output_len), prompt_len, pool, page_size):
        assert count == whole
        return
    growth = tokens_to_reserve(
        config, output_len=0, max_new_tokens=output_len, prompt_len=prompt_len, prompt_budget=14, page_size=page_size
    )
    most, afterwards = (ceil_to_page(n, page_size) for n in (prompt_len + growth, 14 + min(output_len, 36)))
    assert most + (count - 1) * afterwards <= pool < most + count * afterwards
