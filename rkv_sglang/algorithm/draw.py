"""Numbers between 0 and 1, drawn anew for the tokens of each compaction, layer and KV head."""

import torch
from torch import Tensor

from rkv_sglang.algorithm.validation import check_seed

_LOW_32 = 0xFFFFFFFF
# Below 2^31, so that a product with a 32-bit number fits into int64.
MULTIPLIER = 0x45D9F3B


def draw_tokens(num_tokens: int, *, logical_len: int, kv_heads: Tensor, layer: int, seed: int) -> Tensor:
    """Return a number for each token of each head.

    ``(m >> 8) / 2^24``, where ``m`` starts as ``mix(j)`` and then becomes ``mix(m xor n)`` for ``n`` in turn
    ``logical_len``, the head, the layer and the seed; ``j`` is the token's index and ``mix`` scrambles 32 bits: twice
    ``x = (x xor (x >> 16)) * 0x45d9f3b mod 2^32``, then ``x xor (x >> 16)``.

    Args:
        num_tokens: Tokens from the first resident one on.
        logical_len: Tokens ever seen, so that each compaction draws anew.
        kv_heads: Numbers of the KV heads in the whole model, ``[num_kv_heads]``, int64.
        layer: Number of the layer in the whole model.
        seed: In [0, 2^32).

    Returns:
        ``[num_kv_heads, num_tokens]``, fp32, in [0, 1).

    Raises:
        ValueError: The seed is out of range.
    """
    check_seed(seed)
    drawn = _mix(_mix(torch.arange(num_tokens, device=kv_heads.device)) ^ logical_len)
    drawn = _mix(_mix(_mix(drawn ^ kv_heads[:, None]) ^ layer) ^ seed)
    return (drawn >> 8).float() / 2**24


def _mix(numbers: Tensor) -> Tensor:
    for _ in range(2):
        numbers = ((numbers ^ (numbers >> 16)) * MULTIPLIER) & _LOW_32
    return numbers ^ (numbers >> 16)
