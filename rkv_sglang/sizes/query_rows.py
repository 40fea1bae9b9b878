"""Rows of the query window: how many a KV pool needs, and their bytes.

A request needs a row only while it is within ``window`` decode steps of its next compaction. It then holds at least
``capacity - window`` slots of its own, so ``pool slots / (capacity - window)`` rows are enough even if every request
comes due in the same step.

With a head start the first compaction comes at fewer slots, and the row is taken before that. But a request that is to
be compacted has a length limit above ``capacity``, so until then what it holds and what admission has reserved for it
are ``capacity`` slots together: the same number of rows is enough.
"""

from rkv_sglang.config import PolicyConfig


def num_query_rows(config: PolicyConfig, num_slots: int, max_running_requests: int) -> int:
    """Return how many rows suffice for a pool of ``num_slots`` tokens, the unread row 0 not counted."""
    return max(1, min(max_running_requests, num_slots // (config.capacity - config.window)))


def query_bytes_per_slot(
    config: PolicyConfig, num_layers: int, num_qo_heads: int, head_dim: int, itemsize: int
) -> float:
    """Return the bytes of query window per token slot of the KV pool: what sizing the pool must leave over."""
    row_bytes = num_layers * config.window * num_qo_heads * head_dim * itemsize
    return row_bytes / (config.capacity - config.window)
