"""Record of a request's compactions: which tokens every layer and KV head kept."""

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]


def pack_compaction(kept_indices: Any, *, resident_len: int, evicted_before: int) -> dict[str, int | str]:
    """Return one compaction as JSON can hold it.

    Args:
        kept_indices: Of the request's generated tokens, as they were resident, those that stay, ascending,
            ``[num_layers, num_kv_heads, budget]``, integer.
        resident_len: Generated tokens resident before the compaction.
        evicted_before: Generated tokens evicted since the last prefill, before this compaction.

    Returns:
        ``resident_len``, ``evicted_before``, and ``kept``: per layer and KV head a row of ``resident_len`` bits, padded
        to bytes, first token in the lowest bit; compressed with zlib, then base64.
    """
    indices = np.asarray(kept_indices, dtype=np.int64)
    mask = np.zeros((*indices.shape[:2], resident_len), dtype=np.bool_)
    np.put_along_axis(mask, indices, True, axis=2)
    bits = np.packbits(mask, axis=2, bitorder="little")
    kept = base64.b64encode(zlib.compress(bits.tobytes(), 1)).decode("ascii")
    return {"resident_len": resident_len, "evicted_before": evicted_before, "kept": kept}


def unpack_kept(compaction: dict[str, Any], num_layers: int, num_kv_heads: int) -> BoolArray:
    """Return which resident generated tokens stayed, ``[num_layers, num_kv_heads, resident_len]``.

    Raises:
        ValueError: The bits are not those of so many layers, heads and tokens.
    """
    resident_len = int(compaction["resident_len"])
    row_bytes = (resident_len + 7) // 8
    size = num_layers * num_kv_heads * row_bytes
    unpacker = zlib.decompressobj()
    # No more than there should be: a few bytes can be packed gigabytes.
    raw = unpacker.decompress(base64.b64decode(compaction["kept"]), size + 1)
    if len(raw) != size or not unpacker.eof:
        raise ValueError(
            f"a compaction of {resident_len} tokens, {num_layers} layers and {num_kv_heads} KV heads takes {size} "
            "bytes of bits, and the trace has others: it is damaged"
        )
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(num_layers, num_kv_heads, row_bytes)
    return np.unpackbits(rows, axis=2, count=resident_len, bitorder="little").astype(np.bool_)


def kept_positions(
    compactions: Sequence[dict[str, Any]], num_layers: int, num_kv_heads: int, num_tokens: int
) -> list[BoolArray]:
    """Return, after each compaction, which generated tokens every layer and KV head still holds.

    Tokens generated after a compaction are not held yet, so False. A request that was preempted and computed again
    starts anew: a compaction before which nothing was evicted finds every token resident.

    Args:
        compactions: What ``pack_compaction`` returned, in order.
        num_tokens: Generated tokens of the whole answer, the width of the result.

    Returns:
        One array ``[num_layers, num_kv_heads, num_tokens]`` per compaction.

    Raises:
        ValueError: The trace contradicts itself.
    """
    held = np.zeros((num_layers, num_kv_heads, num_tokens), dtype=np.bool_)
    result, seen = [], 0
    for number, compaction in enumerate(compactions, start=1):
        resident_len, evicted_before = int(compaction["resident_len"]), int(compaction["evicted_before"])
        total = resident_len + evicted_before
        if evicted_before == 0:
            held[:], seen = False, 0
        if not seen <= total <= num_tokens:
            raise ValueError(f"compaction {number} speaks of {total} tokens of {num_tokens}: the trace is damaged")
        kept = unpack_kept(compaction, num_layers, num_kv_heads)
        held[:, :, seen:total] = True
        if np.any(held.sum(axis=2) != resident_len):
            raise ValueError(f"compaction {number} finds other tokens than the one before left: the trace is damaged")
        after = np.zeros_like(held)
        # Row by row both have resident_len entries, in the same order.
        after[held] = kept.reshape(-1)
        held, seen = after, total
        result.append(held.copy())
    return result
