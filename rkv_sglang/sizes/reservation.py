"""Tokens that a request may still need: what admission reserves.

A request under a policy never holds more than its prompt and ``capacity`` generated tokens, except after a retraction:
then its whole history is prefilled again and stays until ``window`` decode queries were seen.
"""

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.lengths import steps_until_due


def decode_growth(
    config: PolicyConfig, *, prompt_len: int, resident_len: int, tokens_left: int, decode_steps: int
) -> int:
    """Return the most tokens by which a request's resident KV can still grow at any time before it ends.

    Exact, but for a request with a head start whose length limit ends it before it is back at its capacity.

    Args:
        config: The settings; a request too short for a compaction grows by ``tokens_left`` under any.
        prompt_len: Tokens of the prompt.
        resident_len: Slots the request holds, in tokens, prompt included.
        tokens_left: Tokens that it may still generate.
        decode_steps: Decode steps since the last prefill.
    """
    # After the next compaction it comes back to its capacity again and again, which is no more than it holds by then.
    # So a head start changes nothing: what is not held before that compaction is held later.
    return min(max(tokens_left, 0), steps_until_due(config, prompt_len, resident_len, decode_steps))


def tokens_to_reserve(
    config: PolicyConfig, *, output_len: int, max_new_tokens: int, held_len: int | None = None
) -> int:
    """Return the tokens that a waiting request can grow by after its prefill.

    ``min(max_new_tokens, capacity)`` for a new request; a retracted one is prefilled with its ``output_len`` tokens, or
    restored with ``held_len`` of them.
    """
    # The prompt cancels out.
    return decode_growth(
        config,
        prompt_len=0,
        resident_len=output_len if held_len is None else held_len,
        tokens_left=max_new_tokens - output_len,
        decode_steps=0,
    )


def most_growth(num_prefill_tokens: int, pool_size: int) -> int:
    """Return by how many tokens a request can grow in an otherwise empty pool; negative if it does not fit at all.

    Args:
        num_prefill_tokens: What it holds after its prefill.
        pool_size: Tokens, whole pages.
    """
    return pool_size - num_prefill_tokens
