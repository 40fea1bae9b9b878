"""Head start: how early a request's first compaction comes, where those of requests that start together are staggered.

It depends on nothing but the request's own tokens and its settings, so a request is compacted at the same tokens
whatever else is served, and once more so if it is computed again.
"""

import hashlib
import sys
from array import array
from collections.abc import Sequence

from rkv_sglang.config import PolicyConfig

# Samples of one prompt start to differ in their output. Also the first output after which a compaction can be early.
NUM_HASHED_OUTPUTS = 16


def most_head_start(config: PolicyConfig) -> int:
    """Return the largest head start, in tokens: fewer than the buffer, so that something is evicted.

    Nor may a compaction come before the outputs that decide are resident. Whole blocks, so that whole blocks are above
    the budget.
    """
    most = max(min(config.buffer - 1, config.capacity - NUM_HASHED_OUTPUTS), 0)
    return most // config.block * config.block


def head_start(config: PolicyConfig, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int | None:
    """Return by how many tokens the first compaction comes early, 0 to ``most_head_start``; None if not known yet.

    BLAKE2b, 8 bytes, over the tokens of the prompt and the first ``NUM_HASHED_OUTPUTS`` of the output, each a signed
    64-bit integer; the digest is read as one integer, which chooses among the multiples of ``config.block``. All
    numbers are little-endian.

    Args:
        prompt_ids: Token ids.
        output_ids: Those generated so far. With fewer than ``NUM_HASHED_OUTPUTS`` it is not known, unless it can only
            be 0.
    """
    most = most_head_start(config)
    if most == 0:
        return 0
    if len(output_ids) < NUM_HASHED_OUTPUTS:
        return None
    ids = array("q", prompt_ids)
    ids.extend(output_ids[:NUM_HASHED_OUTPUTS])
    if sys.byteorder == "big":
        ids.byteswap()
    digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % (most // config.block + 1) * config.block
