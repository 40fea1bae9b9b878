"""R-KV score of a whole batch, and the parts of it that SnapKV and H2O are, straight from the paged pool.

Source: arXiv 2505.24133.

Five kernels and one fill, whatever the number of layers, heads and requests: two passes over the keys, a scan and a
reduction between them, and a last step that pools and combines; up to two kernels more where a request has
``PromptHits``. No L x L matrix: 16 bytes per token and head beside the result, and some per block. The function is that
of ``rkv_sglang.algorithm.scoring`` with its sums in another order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.algorithm.validation import check_kernel_size, check_mix_lambda, check_threshold
from rkv_sglang.kernels.paged_batch import VECTOR_BYTES, PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.checks import check_prompt_hits, check_score_inputs
from rkv_sglang.kernels.score.config import (
    CHUNK,
    COMBINE_BLOCK,
    NUM_STAGES,
    NUM_WARPS,
    ScoreConfig,
    choose_factor_dtype,
    key_constants,
    scan_constants,
    score_config,
)
from rkv_sglang.kernels.score.key_passes import score_tokens_kernel, summarise_blocks_kernel
from rkv_sglang.kernels.score.scan import scan_lists, scan_rows, scan_rows_kernel
from rkv_sglang.kernels.score.totals import combine_scores_kernel, reduce_blocks_kernel


def rkv_scores_paged(
    keys: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    *,
    mix_lambda: float,
    kernel_size: int,
    similarity_threshold: float,
    model: ModelAttention = PLAIN_ATTENTION,
    prompt_hits: Sequence[PromptHits | None] | None = None,
    config: ScoreConfig | None = None,
) -> Tensor:
    """Score every token: ``mix_lambda * importance - (1 - mix_lambda) * redundancy``. Queues no sync.

    Mutates those of ``prompt_hits`` that are not filled.

    Args:
        keys: Keys of all layers, as cached.
        batch: The requests; ``batch.window`` is the window.
        queries: Post-RoPE queries of each request's last tokens, oldest first,
            ``[num_layers, num_requests, window, num_qo_heads, head_dim]``, bf16, fp16 or fp32, stride 1 along head_dim.
        mix_lambda: Weight of importance, in [0, 1].
        kernel_size: Width of the max-pool over importance, odd.
        similarity_threshold: Cosine above which two keys are near-duplicates.
        model: How logits are made of products.
        prompt_hits: Per request and of these layers, what its prompt finds within the prompt; None to find it anew.
        config: Sizes of the programs; default: ``score_config``.

    Returns:
        ``[num_layers, num_kv_heads, num_tokens]``, fp32, on the device of the keys; request r has the columns
        ``batch.token_indptr[r]`` to ``batch.token_indptr[r + 1]``. Higher means keep; -inf in the window.

    Raises:
        ValueError: A shape, dtype, device, stride or value differs from the above.

    Reference: ``rkv_sglang.algorithm.reference.rkv_scores``.
    """
    check_mix_lambda(mix_lambda)
    check_threshold(similarity_threshold)
    hits = [None] * batch.num_requests if prompt_hits is None else prompt_hits
    check_prompt_hits(hits, keys, batch)
    return combined_scores(keys, batch, queries, kernel_size, mix_lambda, similarity_threshold, model, config, hits)


def combined_scores(
    keys: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    kernel_size: int,
    importance_weight: float,
    threshold: float | None,
    model: ModelAttention,
    config: ScoreConfig | None,
    prompt_hits: Sequence[PromptHits | None] = (),
) -> Tensor:
    """``rkv_scores_paged``; without a threshold, the weighted importance only."""
    check_kernel_size(kernel_size)
    check_score_inputs(keys, batch, queries)
    unscored = batch.window
    passes = run_key_passes(
        keys,
        batch,
        queries,
        threshold=threshold,
        num_unscored=unscored,
        model=model,
        config=config,
        prompt_hits=prompt_hits,
    )
    grid = (triton.cdiv(batch.max_kv_len, COMBINE_BLOCK), batch.num_requests, keys.num_layers * keys.num_kv_heads)
    combine_scores_kernel[grid](
        token_indptr_ptr=batch.token_indptr,
        attention_ptr=passes.attention,
        exp_sums_ptr=passes.exp_sums,
        scores_ptr=passes.column_means,
        num_tokens=batch.num_tokens,
        num_blocks=passes.num_blocks,
        reach=kernel_size // 2,
        importance_weight=importance_weight,
        redundancy_weight=1.0 - importance_weight,
        WINDOW=batch.window,
        KEY_BLOCK=passes.block,
        BLOCK=COMBINE_BLOCK,
        CHUNK=CHUNK,
        WITH_REDUNDANCY=threshold is not None,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return passes.column_means


@dataclass(frozen=True, kw_only=True)
class KeyPasses:
    """Results of the passes over the keys.

    Attributes:
        attention: Mean over the queries of the attention that each token gets, -inf where it is not scored,
            ``[num_layers, num_kv_heads, num_tokens]``, fp32.
        column_means: Mean of each similarity column, of the same shape; unwritten without a threshold.
        exp_sums: Per block, the sum of their exponentials; None without a threshold.
        num_blocks, block: Rows of per-block results, and tokens of a block.
    """

    attention: Tensor
    column_means: Tensor
    exp_sums: Tensor | None
    num_blocks: int
    block: int


def run_key_passes(
    keys: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    *,
    threshold: float | None,
    num_unscored: int,
    model: ModelAttention,
    config: ScoreConfig | None,
    prompt_hits: Sequence[PromptHits | None] = (),
) -> KeyPasses:
    """Run the passes that read keys and the reduction between them, on inputs that were checked.

    Args:
        queries: ``[num_layers, num_requests, window, num_qo_heads, head_dim]``; the window may be any, and the logits
            of one query are the largest over its group of heads.
        threshold: For the redundancy; None leaves it out.
        num_unscored: Last tokens that get no attention.
        model: How logits are made of products.
        prompt_hits: For the redundancy, one entry per request.
    """
    num_layers, num_requests, window, num_qo_heads, head_dim = queries.shape
    factor_dtype = choose_factor_dtype(keys.dtype, queries.dtype)
    config = score_config(head_dim, keys.dtype, factor_dtype) if config is None else config
    constants = key_constants(
        storage_dtype=keys.storage_dtype,
        dtype=keys.dtype,
        factor_dtype=factor_dtype,
        page_size=keys.page_size,
        alignment_bytes=keys.alignment_bytes,
        # The same for every number of requests: their stride divides that of a layer.
        query_alignment_bytes=math.gcd(
            VECTOR_BYTES, queries.data_ptr(), *(stride * queries.element_size() for stride in queries.stride()[:4])
        ),
        window=window,
        gqa_group_size=num_qo_heads // keys.num_kv_heads,
        head_dim=head_dim,
        config=config,
        with_redundancy=threshold is not None,
        num_unscored=num_unscored,
        logit_cap=model.logit_cap,
    )
    block_w, block_d = constants["BLOCK_W"], constants["BLOCK_D"]
    num_heads, num_tokens = num_layers * keys.num_kv_heads, batch.num_tokens
    # The rows of the per-block results: see ``key_passes``.
    num_blocks = num_tokens // config.block + num_requests

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=keys.device)

    attention, column_means = (fp32(num_layers, keys.num_kv_heads, num_tokens) for _ in range(2))
    logit_maxima, logit_sums = fp32(num_heads, num_blocks, block_w), fp32(num_heads, num_blocks, block_w)
    logit_totals = fp32(num_heads, num_requests, 2, block_w)
    key_sums = key_totals = exp_sums = None
    if threshold is not None:
        key_sums, key_totals = fp32(num_heads, num_blocks, block_d), fp32(num_heads, num_requests, block_d)
        exp_sums = fp32(num_heads, num_blocks)
    lists = scan_lists(batch, attention, column_means, with_redundancy=threshold is not None)

    # What both passes over the keys take.
    shared: dict[str, Any] = {
        "key_ptrs": keys.pointers,
        "key_scales_ptr": keys.scales,
        "queries_ptr": queries,
        "kv_indptr_ptr": batch.kv_indptr,
        "kv_indices_ptr": batch.kv_indices,
        "token_indptr_ptr": batch.token_indptr,
        "num_kv_heads": keys.num_kv_heads,
        "num_tokens": num_tokens,
        "num_blocks": num_blocks,
        "stride_page": keys.stride_page,
        "stride_slot": keys.stride_slot,
        "stride_head": keys.stride_head,
        "stride_query_layer": queries.stride(0),
        "stride_query_request": queries.stride(1),
        "stride_query_token": queries.stride(2),
        "stride_query_head": queries.stride(3),
        "softmax_scale": model.scale_for(head_dim),
    }
    grid = (triton.cdiv(batch.max_kv_len, config.block), num_requests, num_heads)
    key_shape = {"num_warps": config.num_warps, "num_stages": NUM_STAGES}
    summarise_blocks_kernel[grid](
        **shared,
        key_sums_ptr=key_sums,
        logit_maxima_ptr=logit_maxima,
        logit_sums_ptr=logit_sums,
        **lists,
        threshold=threshold or 0.0,
        FIRST_COLUMNS=config.first_columns or config.block_columns,
        **constants,
        **key_shape,
    )
    if threshold is not None:
        scanned = {name: value for name, value in shared.items() if name in scan_rows_kernel.arg_names}
        scanned |= lists | scan_constants(constants, config) | key_shape
        scanned |= {"prompt_lens_ptr": batch.prompt_lens, "threshold": threshold}
        scan_rows(scanned, grid, prompt_hits or [None] * num_requests, keys.device)
    reduce_blocks_kernel[(num_requests, num_heads)](
        token_indptr_ptr=batch.token_indptr,
        key_sums_ptr=key_sums,
        logit_maxima_ptr=logit_maxima,
        logit_sums_ptr=logit_sums,
        key_totals_ptr=key_totals,
        logit_totals_ptr=logit_totals,
        num_blocks=num_blocks,
        BLOCK=config.block,
        CHUNK=CHUNK,
        BLOCK_W=block_w,
        BLOCK_D=block_d,
        WITH_REDUNDANCY=threshold is not None,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    score_tokens_kernel[grid](
        **shared,
        key_totals_ptr=key_totals,
        logit_totals_ptr=logit_totals,
        factors_ptr=lists["factors_ptr"],
        exempt_ptr=lists["exempt_ptr"],
        attention_ptr=attention,
        column_means_ptr=column_means if threshold is not None else None,
        exp_sums_ptr=exp_sums,
        **constants,
        **key_shape,
    )
    return KeyPasses(
        attention=attention, column_means=column_means, exp_sums=exp_sums, num_blocks=num_blocks, block=config.block
    )
