"""Bytes of the pool, and scores by the plainest code there is: what both ways to compact are checked by."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rkv_sglang.algorithm import reference
from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest
from rkv_sglang.kernels.gathered import as_numbers
from rkv_sglang.policies import RKV, Policy, ScoreInputs, as_scored, is_blind, observes

# Of the spread of scores: below this, which of two is the better one is a matter of the order of summation.
_SUM_TOLERANCE = 1e-4
# As near to the threshold a cosine may fall on either side of it.
COSINE_TOLERANCE = 1e-6
_LARGE_ODD = 0x9E3779B97F4A7C15 - 2**64


class CompactionDiffersError(RuntimeError):
    """A compaction did something else than it should; one line."""


def score_tolerance(policy: Policy) -> float:
    """Return the share of the spread of a policy's scores within which either of two may be the better one.

    What is made of places alone is exact, and those that it ranks by their index may be far closer than that.
    """
    return 0.0 if is_blind(policy) else _SUM_TOLERANCE


def plain_scores(
    buffers: KVBuffers,
    request: DueRequest[Any],
    layer: int,
    rows: tuple[Tensor, Tensor],
    queries: Tensor,
    policy: Policy,
    model: ModelAttention,
    observed: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield a layer's scores by the plainest way there is; several where a rounding error decides between them.

    Args:
        layer: Of the buffers, from 0.
        rows: What ``rows_of`` copied of the request before its compaction.
        queries: Of its window, ``[num_layers, window, num_qo_heads, head_dim]``.
        observed: What the policy observed at this compaction, for one that observes.

    Returns:
        Of each way ``[num_kv_heads, resident_len - window]``.
    """
    inputs = replace(
        _inputs_of(buffers, request, layer, rows, queries, model),
        values=as_numbers(buffers.values, layer, rows[1][layer]),
        observed=observed,
    )
    if type(policy) is not RKV:
        yield as_scored(policy.score(inputs)).scores
        return
    for shift in (0.0, COSINE_TOLERANCE, -COSINE_TOLERANCE):
        yield reference.rkv_scores(
            inputs.queries,
            inputs.keys,
            mix_lambda=policy.mix_lambda,
            kernel_size=policy.kernel_size,
            similarity_threshold=min(max(policy.similarity_threshold + shift, -1.0), 1.0),
            model=inputs.model,
        )


def observed_anew(
    buffers: KVBuffers,
    request: DueRequest[Any],
    rows: tuple[Tensor, Tensor],
    queries: Tensor,
    policy: Any,
    model: ModelAttention,
) -> Tensor | None:
    """Return what a policy observes of a request, arguments as in ``plain_scores``; None if it observes nothing."""
    if not observes(policy):
        return None
    first, sliding = buffers.keys.first_layer, model.sliding_among(buffers.keys.first_layer, len(queries))
    layers = policy.observed_layers([first + layer for layer in range(len(queries)) if layer not in sliding])
    of_layers = (_inputs_of(buffers, request, layer - first, rows, queries, model) for layer in layers)
    observed: Tensor = policy.observe(of_layers)
    return observed


def _inputs_of(
    buffers: KVBuffers,
    request: DueRequest[Any],
    layer: int,
    rows: tuple[Tensor, Tensor],
    queries: Tensor,
    model: ModelAttention,
) -> ScoreInputs:
    """Return what ``plain_scores`` gives a policy, but values."""
    return ScoreInputs(
        queries=queries[layer],
        keys=as_numbers(buffers.keys, layer, rows[0][layer]),
        prompt_len=request.plan.prompt_len,
        logical_len=request.logical_len,
        state=None if request.kept_state is None else request.kept_state[layer],
        memory=None if request.memory is None else request.memory[layer],
        observed=request.observed,
        layer=buffers.keys.first_layer + layer,
        first_kv_head=buffers.keys.first_kv_head,
        budget=request.plan.budget,
        model=model,
    )


def explains(scores: Tensor, kept: Tensor, prompt_len: int, window: int, tolerance: float) -> bool:
    """Return whether those kept are the best, or as good as the best but for a rounding error.

    Args:
        scores: ``[num_kv_heads, L - window]``.
        kept: Indices of generated tokens, ``[num_kv_heads, budget]``, ascending, the window at the end.
        tolerance: As ``score_tolerance`` says it of the policy.
    """
    budget = kept.shape[1]
    if torch.equal(reference.select_kept(scores, prompt_len, window, budget), kept):
        return True
    candidates = scores[:, prompt_len:]
    is_kept = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, kept[:, : budget - window], True)
    worst_kept = candidates.masked_fill(~is_kept, torch.inf).amin(dim=1)
    best_dropped = candidates.masked_fill(is_kept, -torch.inf).amax(dim=1)
    spread = candidates.amax(dim=1) - candidates.amin(dim=1)
    return bool((worst_kept >= best_dropped - tolerance * spread).all())


def rows_of(buffers: KVBuffers, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Copy what some slots hold, ``[num_layers, len(slots), num_kv_heads, head_dim]`` of keys and of values."""
    both = (buffers.keys, buffers.values)
    keys, values = (torch.stack([layer.flatten(0, 1)[slots] for layer in part.tensors]) for part in both)
    return keys, values


def checksums(buffers: KVBuffers, slots: Tensor) -> list[int]:
    """Return a number for each layer's keys and values in these slots, by their bytes and order."""
    sums = []
    for part in (buffers.keys, buffers.values):
        for layer in part.tensors:
            numbers = layer.flatten(0, 1)[slots].contiguous().view(torch.uint8).flatten().to(torch.int64)
            # int64 wraps around, which is all right for a checksum.
            weights = torch.arange(1, numbers.numel() + 1, device=numbers.device) * _LARGE_ODD
            sums.append(int((numbers * (weights ^ (weights >> 31))).sum()))
    return sums


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of one dtype hold the same bytes; NaN equals itself, and 0 is not -0."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
