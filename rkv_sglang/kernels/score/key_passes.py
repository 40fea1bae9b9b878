# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernel of the score that reads keys: one program for each request, layer and head, from first to last key.

It reads the keys three times, and what it read before is still in the L2 cache unless a request is very long: for their
lengths and the sum of the unit keys; for the softmax denominators and each row's exempt column; and for what follows
from all of these. Only the first reading looks at single numbers. The others are matrix products alone, for which the
compiler fetches tiles ahead of their use. Nothing is exchanged between programs and all sums have one order, so the
scores are the same in every run.

A row exempts the newest column above the threshold. Most rows find theirs in the newest tile of columns, which is held
against every row in the second reading. The others are written to a list and only they go on, packed into full tiles,
to older and older columns, until none waits.
"""

import triton
import triton.language as tl

from rkv_sglang.kernels.score.device import (
    BATCH_POINTERS,
    NORM_EPS,
    VARYING_SIZES,
    dot_rows,
    key_rows,
    load_queries,
    load_tile,
    unit_factors,
    window_logits,
)


@triton.jit
def _cosines(
    keys,
    rows,
    inside,
    tokens,
    factors,
    column_keys,
    column_rows,
    exists,
    columns,
    column_factors,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_WIDTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    E4M3: tl.constexpr,
):
    """Return the cosine of every row and column, 0 on the diagonal, ``[BLOCK, BLOCK]``, fp32."""
    cosines = dot_rows(
        keys, column_keys, rows, inside, column_rows, exists, HEAD_DIM, BLOCK_D, DOT_WIDTH, DOT_DTYPE, E4M3
    )
    cosines *= factors[:, None] * column_factors[None, :]
    return tl.where(tokens[:, None] == columns[None, :], 0.0, cosines)


@triton.jit
def _means_with_total(
    keys,
    rows,
    inside,
    total,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOT_WIDTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    E4M3: tl.constexpr,
):
    """Return the products of raw keys with an fp32 vector of numbers up to 1, ``[BLOCK]``, fp32, by matrix units.

    16 bits hold too little of the vector: three numbers of ``DOT_DTYPE`` add up to each of its own.
    """
    if tl.float32 == DOT_DTYPE:
        products = tl.zeros([keys.shape[0]], tl.float32)
        for start in range(0, HEAD_DIM, DOT_WIDTH):
            part = load_tile(rows, inside, start, HEAD_DIM, DOT_WIDTH, E4M3).to(tl.float32)
            places = start + tl.arange(0, DOT_WIDTH)
            own = tl.sum(tl.where(tl.arange(0, BLOCK_D)[None, :] == places[:, None], total[None, :], 0.0), axis=1)
            products += tl.sum(part * own[None, :], axis=1)
        return products
    high = total.to(DOT_DTYPE)
    rest = total - high.to(tl.float32)
    middle = rest.to(DOT_DTYPE)
    low = (rest - middle.to(tl.float32)).to(DOT_DTYPE)
    places = tl.arange(0, 16)[:, None]
    # [16, BLOCK_D], of which three rows are not 0
    parts = tl.where(places == 0, high[None, :], tl.where(places == 1, middle[None, :], low[None, :]))
    parts = tl.where(places < 3, parts, 0.0).to(DOT_DTYPE)
    return tl.sum(tl.dot(keys.to(DOT_DTYPE), tl.trans(parts)), axis=1)


@triton.jit
def _newest_hits(cosines, inside, exists, threshold, BLOCK: tl.constexpr):
    """Return each row's newest column above the threshold, -1 if none, ``[BLOCK]``, and its cosine in its place.

    The second result is 0 elsewhere, ``[BLOCK, BLOCK]``.
    """
    places = tl.arange(0, BLOCK)
    above = (cosines > threshold) & exists[None, :] & inside[:, None]
    hits = tl.max(tl.where(above, places[None, :], -1), axis=1)
    return hits, tl.where(places[None, :] == hits[:, None], cosines, 0.0)


@triton.jit
def _append(list_ptr, length, tokens, waits):
    """Write the tokens that wait behind the ``length`` first of a list and return its new length."""
    flags = waits.to(tl.int32)
    tl.store(list_ptr + length + tl.cumsum(flags, axis=0) - 1, tokens, mask=waits)
    return length + tl.sum(flags, axis=0)


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=BATCH_POINTERS)
def score_request_kernel(
    key_ptrs,
    key_scales_ptr,
    queries_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    attention_ptr,
    column_means_ptr,
    exp_sums_ptr,
    factors_ptr,
    exempt_ptr,
    waiting_ptr,
    num_kv_heads,
    num_tokens,
    stride_page,
    stride_slot,
    stride_head,
    stride_query_layer,
    stride_query_request,
    stride_query_token,
    stride_query_head,
    softmax_scale,
    threshold,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    QUERY_ALIGNMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    DOT_WIDTH: tl.constexpr,
    WITH_REDUNDANCY: tl.constexpr,
    NUM_UNSCORED: tl.constexpr,
):
    """Per token: the mean attention of the window's queries and the mean of its similarity column.

    The attention of the last ``NUM_UNSCORED`` keys is -inf, and they are left out of the softmax. ``factors_ptr`` and
    ``exempt_ptr`` ``[heads, num_tokens]`` and ``waiting_ptr`` ``[2, heads, num_tokens]`` are the program's own to write
    on.
    """
    layer_head = tl.program_id(0).to(tl.int64)
    request = tl.program_id(1)
    layer, head = layer_head // num_kv_heads, layer_head % num_kv_heads
    first_column = tl.load(token_indptr_ptr + request)
    kv_len = (tl.load(token_indptr_ptr + request + 1) - first_column).to(tl.int32)
    base = tl.load(key_ptrs + layer).to(tl.pointer_type(ELEMENT)) + head * stride_head
    page_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + request)
    scale = tl.load(key_scales_ptr + layer)
    row = layer_head * num_tokens + first_column

    query_ptr = queries_ptr + layer * stride_query_layer + request.to(tl.int64) * stride_query_request
    query_ptr += head * GROUP_SIZE * stride_query_head
    steps = tl.arange(0, BLOCK_W)
    # Kept in registers where one product takes all heads of the group.
    queries, query_rows, observed = load_queries(
        query_ptr,
        0,
        stride_query_token,
        stride_query_head,
        WINDOW,
        GROUP_SIZE,
        HEAD_DIM,
        BLOCK_W,
        BLOCK_D,
        HEADS,
        QUERY_ALIGNMENT,
    )
    maxima = tl.full([BLOCK_W], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_W], tl.float32)

    places = tl.arange(0, BLOCK)
    if WITH_REDUNDANCY:
        key_total = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, kv_len, BLOCK):
            tokens = start + places
            inside = tokens < kv_len
            rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
            numbers = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3).to(tl.float32)
            factors = unit_factors(tl.sum(numbers * numbers, axis=1), scale)
            tl.store(factors_ptr + row + tokens, factors, mask=inside)
            key_total += tl.sum(numbers * factors[:, None], axis=0)
        # The factors are read by other threads of this program.
        tl.debug_barrier()
        # The newest tile of columns.
        columns = kv_len - BLOCK + places
        exists = columns >= 0
        column_rows = key_rows(
            base, page_ptr, tl.maximum(columns, 0), exists, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT
        )
        column_keys = load_tile(column_rows, exists, 0, HEAD_DIM, BLOCK_D, E4M3)
        column_factors = tl.load(factors_ptr + row + columns, mask=exists, other=0.0)
        exempt = tl.zeros([BLOCK], tl.float32)
        num_waiting = 0

    for start in range(0, kv_len, BLOCK):
        tokens = start + places
        inside = tokens < kv_len
        rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
        keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3)
        # [BLOCK, BLOCK_W]
        logits = window_logits(
            keys,
            rows,
            inside,
            queries,
            query_rows,
            observed,
            query_ptr,
            stride_query_token,
            stride_query_head,
            softmax_scale * scale,
            tokens < kv_len - NUM_UNSCORED,
            WINDOW,
            GROUP_SIZE,
            HEAD_DIM,
            BLOCK_W,
            BLOCK_D,
            HEADS,
            DOT_WIDTH,
            DOT_DTYPE,
            E4M3,
            QUERY_ALIGNMENT,
        )
        larger = tl.maximum(maxima, tl.max(logits, axis=0))
        # -inf less -inf is NaN: until a logit is seen, subtract 0.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        sums = sums * tl.exp(maxima - shift) + tl.sum(tl.exp(logits - shift[None, :]), axis=0)
        maxima = larger
        if WITH_REDUNDANCY:
            factors = tl.load(factors_ptr + row + tokens, mask=inside, other=0.0)
            cosines = _cosines(
                keys,
                rows,
                inside,
                tokens,
                factors,
                column_keys,
                column_rows,
                exists,
                columns,
                column_factors,
                HEAD_DIM,
                BLOCK_D,
                DOT_WIDTH,
                DOT_DTYPE,
                E4M3,
            )
            hits, found = _newest_hits(cosines, inside, exists, threshold, BLOCK)
            exempt += tl.sum(found, axis=0)
            num_waiting = _append(waiting_ptr + row, num_waiting, tokens, inside & (hits < 0))

    # Columns from here on were looked at.
    end = kv_len
    oldest_exempt = 0.0
    if WITH_REDUNDANCY:
        tl.store(exempt_ptr + row + columns, exempt, mask=exists)
        end = tl.maximum(kv_len - BLOCK, 0)
        # The list that is read and the one that is written change places, each ``plane`` numbers from the other.
        plane = tl.num_programs(0).to(tl.int64) * num_tokens
        source = plane * 0
        while (end > 0) & (num_waiting > 0):
            # What the list holds was written by other threads of this program.
            tl.debug_barrier()
            columns = end - BLOCK + places
            exists = columns >= 0
            column_rows = key_rows(
                base, page_ptr, tl.maximum(columns, 0), exists, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT
            )
            column_keys = load_tile(column_rows, exists, 0, HEAD_DIM, BLOCK_D, E4M3)
            column_factors = tl.load(factors_ptr + row + columns, mask=exists, other=0.0)
            exempt = tl.zeros([BLOCK], tl.float32)
            still_waiting = 0
            for first in range(0, num_waiting, BLOCK):
                inside = first + places < num_waiting
                tokens = tl.load(waiting_ptr + source + row + first + places, mask=inside, other=0)
                rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
                keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3)
                factors = tl.load(factors_ptr + row + tokens, mask=inside, other=0.0)
                cosines = _cosines(
                    keys,
                    rows,
                    inside,
                    tokens,
                    factors,
                    column_keys,
                    column_rows,
                    exists,
                    columns,
                    column_factors,
                    HEAD_DIM,
                    BLOCK_D,
                    DOT_WIDTH,
                    DOT_DTYPE,
                    E4M3,
                )
                hits, found = _newest_hits(cosines, inside, exists, threshold, BLOCK)
                exempt += tl.sum(found, axis=0)
                waits = inside & (hits < 0)
                still_waiting = _append(waiting_ptr + (plane - source) + row, still_waiting, tokens, waits)
            tl.store(exempt_ptr + row + columns, exempt, mask=exists)
            num_waiting = still_waiting
            source = plane - source
            end = tl.maximum(end - BLOCK, 0)
        # Rows without any hit exempt column 0; its own row has 0 there.
        tl.debug_barrier()
        oldest_rows = key_rows(base, page_ptr, places * 0, places == 0, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
        oldest = tl.sum(load_tile(oldest_rows, places == 0, 0, HEAD_DIM, BLOCK_D, E4M3).to(tl.float32), axis=0)
        oldest *= tl.load(factors_ptr + row)
        for first in range(0, num_waiting, BLOCK):
            inside = first + places < num_waiting
            tokens = tl.load(waiting_ptr + source + row + first + places, mask=inside, other=0)
            rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
            keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3).to(tl.float32)
            factors = tl.load(factors_ptr + row + tokens, mask=inside, other=0.0)
            cosines = tl.sum(keys * oldest[None, :], axis=1) * factors
            oldest_exempt += tl.sum(tl.where(tokens > 0, cosines, 0.0), axis=0)
        key_total /= kv_len
        exp_sum = 0.0

    maxima = tl.where(maxima == float("-inf"), 0.0, maxima)
    weights = tl.where(steps < WINDOW, 1.0 / (sums * WINDOW), 0.0)
    for start in range(0, kv_len, BLOCK):
        tokens = start + places
        inside = tokens < kv_len
        scored = tokens < kv_len - NUM_UNSCORED
        rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
        keys = load_tile(rows, inside, 0, HEAD_DIM, BLOCK_D, E4M3)
        logits = window_logits(
            keys,
            rows,
            inside,
            queries,
            query_rows,
            observed,
            query_ptr,
            stride_query_token,
            stride_query_head,
            softmax_scale * scale,
            scored,
            WINDOW,
            GROUP_SIZE,
            HEAD_DIM,
            BLOCK_W,
            BLOCK_D,
            HEADS,
            DOT_WIDTH,
            DOT_DTYPE,
            E4M3,
            QUERY_ALIGNMENT,
        )
        attention = tl.sum(tl.exp(logits - maxima[None, :]) * weights[None, :], axis=1)
        tl.store(attention_ptr + row + tokens, tl.where(scored, attention, float("-inf")), mask=inside)
        if WITH_REDUNDANCY:
            factors = tl.load(factors_ptr + row + tokens, mask=inside, other=0.0)
            column_means = factors * _means_with_total(
                keys, rows, inside, key_total, BLOCK_D, HEAD_DIM, DOT_WIDTH, DOT_DTYPE, E4M3
            )
            # The length of a unit key is a little less than 1, and 0 for a key of zeros.
            lengths = 1.0 - factors * (NORM_EPS / tl.maximum(scale, 1e-30))
            exempt_here = tl.load(exempt_ptr + row + tokens, mask=inside & (tokens >= end), other=0.0)
            exempt_here += tl.where(tokens == 0, oldest_exempt, 0.0)
            means = column_means - (lengths * lengths + exempt_here) / kv_len
            tl.store(column_means_ptr + row + tokens, means, mask=inside)
            # Means of cosines are at most about 1: no maximum need be subtracted before exp.
            exp_sum += tl.sum(tl.where(inside, tl.exp(means), 0.0), axis=0)
    if WITH_REDUNDANCY:
        tl.store(exp_sums_ptr + layer_head * tl.num_programs(1) + request, exp_sum)
