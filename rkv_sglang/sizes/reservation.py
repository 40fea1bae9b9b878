"""Tokens that a request may still need: what admission reserves.

A request under a policy never holds more than its prompt and ``capacity`` generated tokens, except after a retraction:
then its whole history is prefilled again and stays until ``window`` decode queries were seen.

One whose prompt is to be compacted holds what stays of it twice for a moment, and the prompt that it lets go may stay
where it is, because others use it. So both are counted: the prompt's whole pages, and besides them all that the request
comes to hold.
"""

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.lengths import RequestState, steps_until_due
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.prompt_plan import can_compact_prompt, kept_of_prompt


def decode_growth(
    config: PolicyConfig,
    *,
    prompt_len: int,
    resident_len: int,
    tokens_left: int,
    decode_steps: int,
    prompt_budget: int = 0,
    page_size: int = 1,
) -> int:
    """Return the most tokens by which a request's resident KV can still grow at any time before it ends.

    Exact, but for a request with a head start whose length limit ends it before it is back at its capacity.

    Args:
        config: The settings; a request too short for a compaction grows by ``tokens_left`` under any.
        prompt_len: Tokens of the prompt that are held.
        resident_len: Slots the request holds, in tokens, prompt included.
        tokens_left: Tokens that it may still generate.
        decode_steps: Decode steps since the last prefill.
        prompt_budget: What will be kept of its prompt, if that is still to be compacted; else 0.
        page_size: Tokens of a page; only for the former.
    """
    tokens_left = max(tokens_left, 0)
    if prompt_budget > 0:
        steps = max(config.window - decode_steps, 0)
        copied_len = prompt_budget + resident_len - prompt_len + steps
        growth = decode_growth(
            config,
            prompt_len=prompt_budget,
            resident_len=copied_len,
            tokens_left=tokens_left - steps,
            decode_steps=decode_steps + steps,
        )
        during = resident_len + steps + ceil_to_page(copied_len, page_size)
        afterwards = prompt_len // page_size * page_size + ceil_to_page(copied_len + growth, page_size)
        return max(during, afterwards) - resident_len
    # After the next compaction it comes back to its capacity again and again, which is no more than it holds by then.
    # So a head start changes nothing: what is not held before that compaction is held later.
    return min(tokens_left, steps_until_due(config, prompt_len, resident_len, decode_steps))


def tokens_to_reserve(
    config: PolicyConfig,
    *,
    output_len: int,
    max_new_tokens: int,
    held_len: int | None = None,
    prompt_len: int = 0,
    prompt_budget: int = 0,
    page_size: int = 1,
) -> int:
    """Return the tokens that a waiting request can grow by after its prefill.

    ``min(max_new_tokens, capacity)`` for a new request; a retracted one is prefilled with its ``output_len`` tokens, or
    restored with ``held_len`` of them.

    Args:
        prompt_len, prompt_budget, page_size: Of one whose prompt is still to be compacted, as in ``decode_growth``;
            for others the prompt cancels out.
    """
    return decode_growth(
        config,
        prompt_len=prompt_len,
        resident_len=prompt_len + (output_len if held_len is None else held_len),
        tokens_left=max_new_tokens - output_len,
        decode_steps=0,
        prompt_budget=prompt_budget,
        page_size=page_size,
    )


def most_growth(num_prefill_tokens: int, pool_size: int) -> int:
    """Return by how many tokens a request can grow in an otherwise empty pool; negative if it does not fit at all.

    Args:
        num_prefill_tokens: What it holds after its prefill.
        pool_size: Tokens, whole pages.
    """
    return pool_size - num_prefill_tokens


def prompt_budget_after(
    config: PolicyConfig, state: RequestState, prefilled_len: int, pool_size: int, page_size: int
) -> int:
    """Return what will be kept of a request's prompt after a prefill that leaves it so many tokens; 0: it stays whole.

    It stays whole where it is short enough, where its request ends before, and where the pool, even empty, would not
    hold beside it all that the request then comes to hold. This depends on nothing else that is served.

    Args:
        config: Of the request.
        state: Of the request; only what it is made with is read.
        prefilled_len: Tokens held right after the prefill.
        pool_size: Tokens, whole pages.
    """
    output_len = prefilled_len - state.prompt_len
    if not can_compact_prompt(config, state.prompt_len, state.max_new_tokens - output_len):
        return 0
    kept = kept_of_prompt(config, state.prompt_len)
    growth = tokens_to_reserve(
        config,
        output_len=output_len,
        max_new_tokens=state.max_new_tokens,
        prompt_len=state.prompt_len,
        prompt_budget=kept,
        page_size=page_size,
    )
    return kept if growth <= most_growth(prefilled_len, pool_size) else 0
