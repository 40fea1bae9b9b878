"""Pages of a KV pool, counted in tokens."""


def pages_needed(num_tokens: int, page_size: int) -> int:
    """Return how many pages hold ``num_tokens`` tokens."""
    return -(-num_tokens // page_size)


def ceil_to_page(num_tokens: int, page_size: int) -> int:
    """Return the tokens that the pages of ``num_tokens`` tokens hold."""
    return pages_needed(num_tokens, page_size) * page_size
