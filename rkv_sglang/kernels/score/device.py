# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Shared parts of the scoring kernels: reading keys from the pool, their lengths, and the window's logits."""

import triton
import triton.language as tl

from rkv_sglang.algorithm import reference

# Sizes, strides and pointers that differ from batch to batch: to specialise on them would compile while serving. What
# is known of the queries' addresses for every batch, ``QUERY_ALIGNMENT`` says.
VARYING_SIZES = (
    *("num_tokens", "num_blocks"),
    *("stride_query_layer", "stride_query_request", "stride_query_token", "stride_query_head"),
    "kind",
)
BATCH_POINTERS = ("kv_indptr_ptr", "kv_indices_ptr", "token_indptr_ptr", "prompt_lens_ptr", "hits_ptrs")
NORM_EPS = tl.constexpr(reference.NORM_EPS)


@triton.jit
def place_of_program(token_indptr_ptr, num_kv_heads, BLOCK: tl.constexpr):
    """Return which tokens of which head a program of the grid (block, request, layer and head) serves.

    Returns:
        ``request``, ``layer_head`` and its parts ``layer`` and ``head``, the request's ``first_column`` in ragged
        results, its ``kv_len``, and the first token, ``start``. The program has none, and is to return, if
        ``start >= kv_len``: a function that is called cannot do it in its place.
    """
    request = tl.program_id(1)
    layer_head = tl.program_id(2).to(tl.int64)
    layer, head = layer_head // num_kv_heads, layer_head % num_kv_heads
    first_column = tl.load(token_indptr_ptr + request)
    kv_len = (tl.load(token_indptr_ptr + request + 1) - first_column).to(tl.int32)
    start = tl.program_id(0) * BLOCK
    return request, layer_head, layer, head, first_column, kv_len, start


@triton.jit
def block_of_program(
    key_ptrs,
    key_scales_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    layer,
    head,
    kv_len,
    stride_head,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return where in the pool a program's tokens are, given its ``place_of_program``.

    Returns:
        ``base``, the address of the head in page 0; ``page_ptr``, that of the request's first page id; ``scale``, which
        dequantises; ``tokens``, ``[BLOCK]``, and which of them are ``inside`` the request, ``[BLOCK]``.
    """
    base = tl.load(key_ptrs + layer).to(tl.pointer_type(ELEMENT)) + head * stride_head
    page_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + tl.program_id(1))
    scale = tl.load(key_scales_ptr + layer)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < kv_len
    return base, page_ptr, scale, tokens, inside


@triton.jit
def decode_fp8(raw, E4M3: tl.constexpr):
    """Return the fp16 numbers that fp8 bytes mean, exactly, by integer operations that every GPU has."""
    bits = raw.to(tl.uint16)
    if E4M3:
        # The mantissa moves under fp16's exponent, whose bias is 8 more: hence the factor 2**8. 0x7f is NaN.
        magnitude = tl.where((bits & 0x7F) == 0x7F, 0x7E00, (bits & 0x7F) << 7)
        return (((bits & 0x80) << 8) | magnitude).to(tl.uint16).to(tl.float16, bitcast=True) * 256.0
    return (bits << 8).to(tl.float16, bitcast=True)


@triton.jit
def key_rows(
    base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE: tl.constexpr, ALIGNMENT: tl.constexpr
):
    """Return the addresses of the keys of ``tokens`` of one head, ``[BLOCK]``."""
    pages = tl.load(page_ptr + tokens // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    # One addition to the pointer: the hint would be lost with an addition that the compiler removes.
    return tl.multiple_of(base + (pages * stride_page + (tokens % PAGE_SIZE) * stride_slot), ALIGNMENT)


@triton.jit
def load_tile(rows, inside, start, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, E4M3: tl.constexpr):
    """Return dimensions ``start`` to ``start + WIDTH`` of what lies at ``rows``, not yet scaled; 0 if not inside."""
    dims = start + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if HEAD_DIM % WIDTH != 0:
        mask = mask & (dims < HEAD_DIM)[None, :]
    tile = tl.load(rows[:, None] + dims[None, :], mask=mask, other=0)
    if tile.dtype == tl.uint8:
        tile = decode_fp8(tile, E4M3)
    return tile


@triton.jit
def squared_norms(keys):
    """Return the squared lengths of raw keys, ``[BLOCK]``, fp32."""
    numbers = keys.to(tl.float32)
    return tl.sum(numbers * numbers, axis=1)


@triton.jit
def unit_factors(squares, scale):
    """Return what to multiply raw keys by to make them unit keys, ``[BLOCK]``, fp32."""
    # To 2^-23 of itself, as a product of fp32 is; rounded to nearest it would take three times as many instructions.
    return scale / (tl.sqrt(squares) * scale + NORM_EPS)


@triton.jit
def dot_rows(
    left,
    right,
    left_rows,
    left_inside,
    right_rows,
    right_inside,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_WIDTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    E4M3: tl.constexpr,
):
    """Return ``left @ right.T`` in fp32, ``[M, N]``, of tiles ``[M, BLOCK_D]`` and ``[N, BLOCK_D]``.

    fp32 factors have to wait in registers, and whole tiles do not fit there: with ``DOT_WIDTH`` less than ``BLOCK_D``
    they are read again from ``left_rows`` and ``right_rows``, as many dimensions at a time.
    """
    if DOT_WIDTH == BLOCK_D:
        return tl.dot(left.to(DOT_DTYPE), tl.trans(right.to(DOT_DTYPE)), input_precision="ieee")
    products = tl.zeros([left.shape[0], right.shape[0]], tl.float32)
    for start in range(0, HEAD_DIM, DOT_WIDTH):
        left_part = load_tile(left_rows, left_inside, start, HEAD_DIM, DOT_WIDTH, E4M3).to(DOT_DTYPE)
        right_part = load_tile(right_rows, right_inside, start, HEAD_DIM, DOT_WIDTH, E4M3).to(DOT_DTYPE)
        products = tl.dot(left_part, tl.trans(right_part), products, input_precision="ieee")
    return products


@triton.jit
def cap_logits(logits, LOGIT_CAP: tl.constexpr):
    """Return ``LOGIT_CAP * tanh(logits / LOGIT_CAP)``; a cap of 0 leaves them as they are."""
    if LOGIT_CAP > 0.0:
        # exp may overflow to infinity, whose reciprocal is the right 0.
        logits = LOGIT_CAP * (1.0 - 2.0 / (tl.exp(logits * (2.0 / LOGIT_CAP)) + 1.0))
    return logits


@triton.jit
def window_logits(
    keys,
    rows,
    inside,
    query_ptr,
    stride_query_token,
    stride_query_head,
    factor,
    scored,
    WINDOW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_WIDTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    E4M3: tl.constexpr,
    QUERY_ALIGNMENT: tl.constexpr,
    LOGIT_CAP: tl.constexpr,
):
    """Return the largest logit over the query group, ``[BLOCK_W, BLOCK]``, fp32; -inf where a key is not scored.

    Rows from ``WINDOW`` on are of no window token: their logits are 0.
    """
    steps = tl.arange(0, BLOCK_W)
    observed = steps < WINDOW
    logits = tl.full([BLOCK_W, keys.shape[0]], float("-inf"), tl.float32)
    for head in range(GROUP_SIZE):
        query_rows = query_ptr + (head * stride_query_head + steps * stride_query_token)
        query_rows = tl.multiple_of(query_rows, QUERY_ALIGNMENT)
        queries = load_tile(query_rows, observed, 0, HEAD_DIM, BLOCK_D, E4M3)
        products = dot_rows(
            queries, keys, query_rows, observed, rows, inside, HEAD_DIM, BLOCK_D, DOT_WIDTH, DOT_DTYPE, E4M3
        )
        logits = tl.maximum(logits, products, propagate_nan=tl.PropagateNan.ALL)
    # Logits grow with the products, so the largest product makes the largest logit.
    return tl.where(scored[None, :], cap_logits(logits * factor, LOGIT_CAP), float("-inf"))
