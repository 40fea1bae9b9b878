# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""TriAttention's score (arXiv 2604.04921): products of the cached keys with the queries that are to be expected.

One launch: a program serves one KV head of one request and reads its keys twice, the second time from the cache of the
GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.algorithm.rope import Rope
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.checks import check_pool
from rkv_sglang.kernels.score.config import NUM_STAGES
from rkv_sglang.kernels.score.device import BATCH_POINTERS, VARYING_SIZES, decode_fp8, key_rows
from rkv_sglang.kernels.score.pool_pass import POINTER_TYPES, aot_constants, pass_constants
from rkv_sglang.policies.informed.triattention import LEAST_DEVIATION, expected_queries, lengthwise

LEAST = tl.constexpr(LEAST_DEVIATION)
# Keys that a program reads at a time.
BLOCK = 32


@triton.jit
def _load_pairs(rows, inside, pairs, exists, PAIR_STEP: tl.constexpr, PAIR_REACH: tl.constexpr, E4M3: tl.constexpr):
    """Return both parts of some pairs of the keys at ``rows``, ``[BLOCK, BLOCK_F]``, fp32, not yet scaled."""
    mask = inside[:, None] & exists[None, :]
    first = rows[:, None] + pairs[None, :] * PAIR_STEP
    real = tl.load(first, mask=mask, other=0)
    imaginary = tl.load(first + PAIR_REACH, mask=mask, other=0)
    if real.dtype == tl.uint8:
        real = decode_fp8(real, E4M3)
        imaginary = decode_fp8(imaginary, E4M3)
    return real.to(tl.float32), imaginary.to(tl.float32)


@triton.jit
def _products(real, imaginary, query_real, query_imaginary, spread, scale):
    """Return what every query head expects to give each key, ``[BLOCK_G, BLOCK]``, fp32."""
    lengths = tl.sqrt_rn(real * real + imaginary * imaginary)
    products = tl.dot(query_real, tl.trans(real), input_precision="ieee")
    products = tl.dot(query_imaginary, tl.trans(imaginary), products, input_precision="ieee")
    return tl.dot(spread, tl.trans(lengths), products, input_precision="ieee") * scale


@triton.jit(
    do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=(*BATCH_POINTERS, "prompt_lens_ptr", "queries_ptr")
)
def expect_attention_kernel(
    key_ptrs,
    key_scales_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    token_indptr_ptr,
    prompt_lens_ptr,
    queries_ptr,
    spread_ptr,
    scores_ptr,
    num_kv_heads,
    num_tokens,
    stride_page,
    stride_slot,
    stride_head,
    ELEMENT: tl.constexpr,
    E4M3: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    PAIR_STEP: tl.constexpr,
    PAIR_REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Per token: the largest over the query group of the product's distance from its mean, in deviations.

    ``queries`` are ``[num_layers, num_requests, num_qo_heads, num_pairs, 2]``, ``spread``
    ``[num_layers, num_qo_heads, num_pairs]``. -inf in the window.
    """
    request = tl.program_id(0)
    layer_head = tl.program_id(1).to(tl.int64)
    layer, kv_head = layer_head // num_kv_heads, layer_head % num_kv_heads
    first_column = tl.load(token_indptr_ptr + request)
    kv_len = (tl.load(token_indptr_ptr + request + 1) - first_column).to(tl.int32)
    prompt_len = tl.load(prompt_lens_ptr + request)
    num_scored = kv_len - WINDOW
    base = tl.load(key_ptrs + layer).to(tl.pointer_type(ELEMENT)) + kv_head * stride_head
    page_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + request)
    scale = tl.load(key_scales_ptr + layer)

    heads = tl.arange(0, BLOCK_G)
    pairs = tl.arange(0, BLOCK_F)
    of_head = (heads < GROUP_SIZE)[:, None] & (pairs < NUM_PAIRS)[None, :]
    num_qo_heads = num_kv_heads * GROUP_SIZE
    first_head = layer * num_qo_heads + kv_head * GROUP_SIZE
    spread = tl.load(spread_ptr + (first_head + heads)[:, None] * NUM_PAIRS + pairs[None, :], mask=of_head, other=0.0)
    first_head = (layer * tl.num_programs(0) + request) * num_qo_heads + kv_head * GROUP_SIZE
    query_ptr = queries_ptr + ((first_head + heads)[:, None] * NUM_PAIRS + pairs[None, :]) * 2
    query_real = tl.load(query_ptr, mask=of_head, other=0.0)
    query_imaginary = tl.load(query_ptr + 1, mask=of_head, other=0.0)

    count = tl.full([], 0.0, tl.float32)
    means = tl.zeros([BLOCK_G], tl.float32)
    squares = tl.zeros([BLOCK_G], tl.float32)
    for start in range(prompt_len, num_scored, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < num_scored
        rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
        real, imaginary = _load_pairs(rows, inside, pairs, pairs < NUM_PAIRS, PAIR_STEP, PAIR_REACH, E4M3)
        products = _products(real, imaginary, query_real, query_imaginary, spread, scale)
        # The deviation of this block and of all before, put together: no difference of large numbers.
        here = tl.minimum(num_scored - start, BLOCK).to(tl.float32)
        mean_here = tl.sum(tl.where(inside[None, :], products, 0.0), axis=1) / here
        away = tl.where(inside[None, :], products - mean_here[:, None], 0.0)
        shift = mean_here - means
        share = here / (count + here)
        squares += tl.sum(away * away, axis=1) + shift * shift * (count * share)
        means += shift * share
        count += here
    factors = 1.0 / tl.maximum(tl.sqrt_rn(squares / count), LEAST)

    for start in range(0, kv_len, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < kv_len
        rows = key_rows(base, page_ptr, tokens, inside, stride_page, stride_slot, PAGE_SIZE, ALIGNMENT)
        real, imaginary = _load_pairs(rows, inside, pairs, pairs < NUM_PAIRS, PAIR_STEP, PAIR_REACH, E4M3)
        products = _products(real, imaginary, query_real, query_imaginary, spread, scale)
        standard = (products - means[:, None]) * factors[:, None]
        scores = tl.max(tl.where((heads < GROUP_SIZE)[:, None], standard, float("-inf")), axis=0)
        scores = tl.where(tokens < num_scored, scores, float("-inf"))
        tl.store(scores_ptr + layer_head * num_tokens + first_column + tokens, scores, mask=inside)


def triattention_scores_paged(
    keys: PagedBuffers,
    batch: PagedBatch,
    *,
    rope: Rope,
    statistics: QueryStatistics,
    logical_lens: Sequence[int],
    block: int = BLOCK,
) -> Tensor:
    """Score every token by the attention to be expected, and standardised. Queues no sync.

    Args:
        keys: Keys of all layers, as cached.
        batch: The requests; ``batch.window`` is the window.
        rope: How positions turned the keys.
        statistics: Of the queries of these layers, on the device of the keys.
        logical_lens: Tokens ever seen of each request.
        block: Keys that a program reads at a time, a power of two from 16.

    Returns:
        ``[num_layers, num_kv_heads, num_tokens]``, fp32, ragged by ``batch.token_indptr``; -inf in the window.

    Raises:
        ValueError: Sizes or devices do not fit together.

    Reference: ``rkv_sglang.policies.TriAttention``.
    """
    check_pool("keys", keys, batch)
    num_layers, num_qo_heads, num_pairs = statistics.means.shape
    if num_layers != keys.num_layers or num_qo_heads % keys.num_kv_heads or num_pairs != rope.num_pairs:
        raise ValueError(
            f"statistics are of {num_layers} layers, {num_qo_heads} query heads and {num_pairs} pairs, and keys of "
            f"{keys.num_layers} layers and {keys.num_kv_heads} heads, of which {rope.num_pairs} pairs are turned"
        )
    if 2 * num_pairs > keys.head_dim:
        raise ValueError(f"{num_pairs} pairs are more than a head_dim of {keys.head_dim} has")
    phases = rope.turns_on(logical_lens, keys.device)
    # [num_layers, num_requests, num_qo_heads, num_pairs, 2]
    queries = torch.view_as_real(expected_queries(rope, statistics)[:, None] * phases[None, :, None])
    scores = torch.empty((num_layers, keys.num_kv_heads, batch.num_tokens), dtype=torch.float32, device=keys.device)
    expect_attention_kernel[(batch.num_requests, num_layers * keys.num_kv_heads)](
        *(keys.pointers, keys.scales, batch.kv_indptr, batch.kv_indices, batch.token_indptr, batch.prompt_lens),
        *(queries.contiguous(), lengthwise(rope, statistics), scores),
        *(keys.num_kv_heads, batch.num_tokens, keys.stride_page, keys.stride_slot, keys.stride_head),
        **_constants(pass_constants(keys, block, window=batch.window), num_qo_heads // keys.num_kv_heads, rope),
        num_warps=num_warps(num_pairs),
        num_stages=NUM_STAGES,
    )
    return scores


def num_warps(num_pairs: int) -> int:
    """Return the warps of a program: 4 have too few registers for more than 64 pairs."""
    return 4 if num_pairs <= 64 else 8


def _constants(of_pass: dict[str, Any], group_size: int, rope: Rope) -> dict[str, Any]:
    others = {name: value for name, value in of_pass.items() if name not in ("HEAD_DIM", "BLOCK_D")}
    return others | {
        "GROUP_SIZE": group_size,
        "NUM_PAIRS": rope.num_pairs,
        "PAIR_STEP": 1 if rope.is_neox else 2,
        "PAIR_REACH": rope.num_pairs if rope.is_neox else 1,
        # Matrix units want 16 of each.
        "BLOCK_G": max(16, int(triton.next_power_of_2(group_size))),
        "BLOCK_F": max(16, int(triton.next_power_of_2(rope.num_pairs))),
    }


# (name, kernel, signature, constexprs, num_warps, num_stages)
AOT_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
    (
        f"expect_attention_{name}_d{head_dim}",
        expect_attention_kernel,
        {
            name: (POINTER_TYPES | {"prompt_lens_ptr": "*i32"}).get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for name in expect_attention_kernel.arg_names
            if name.islower()
        },
        _constants(
            aot_constants(dtype, head_dim) | {"WINDOW": 8, "BLOCK": BLOCK},
            group_size,
            Rope(inv_freqs=(1.0,) * (head_dim // 2), is_neox=is_neox),
        ),
        num_warps(head_dim // 2),
        NUM_STAGES,
    )
    for name, dtype, head_dim, group_size, is_neox in (
        ("bf16", torch.bfloat16, 64, 7, True),
        ("bf16", torch.bfloat16, 128, 4, True),
        ("bf16_pairs", torch.bfloat16, 128, 4, False),
        ("bf16", torch.bfloat16, 256, 4, True),
        ("fp32", torch.float32, 256, 4, True),
        ("e4m3", torch.float8_e4m3fn, 128, 16, True),
    )
]
