"""Tokens of one request in one layer, read out of a paged pool: what a policy looks at in torch."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.kernels.paged_batch import FP8_DTYPES, PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.scorers import History
from rkv_sglang.policies import Policy, ScoreInputs, needs_values, observes
from rkv_sglang.sizes.pages import pages_needed


@torch.no_grad()
def observe_paged(
    keys: PagedBuffers,
    batch: PagedBatch,
    read_queries: Callable[[slice], Tensor],
    policy: Policy,
    history: Sequence[History],
    model: ModelAttention,
) -> list[Tensor] | list[None]:
    """Return what a policy observes of each request, once for all layers; None of others. Waits for nothing itself.

    Args:
        keys: All layers of the pool.
        read_queries: Given a slice of the layers, returns the window's queries there,
            ``[num_layers, num_requests, window, num_qo_heads, head_dim]``.
        history: Of each request; ``History.observed`` is of the last compaction.
    """
    if not observes(policy):
        return [None] * batch.num_requests
    sliding = model.sliding_among(keys.first_layer, keys.num_layers)
    attending = [keys.first_layer + layer for layer in range(keys.num_layers) if layer not in sliding]
    layers = [number - keys.first_layer for number in policy.observed_layers(attending)]  # type: ignore[attr-defined]
    queries = [read_queries(slice(layer, layer + 1))[0] for layer in layers]
    observed = []
    for request, pages in enumerate(pages_of(batch)):
        of_layers = (
            inputs_of(keys, None, batch, request, pages, layer, own[request], history[request], model)
            for layer, own in zip(layers, queries, strict=True)
        )
        observed.append(policy.observe(of_layers))  # type: ignore[attr-defined]
    return observed


def pages_of(batch: PagedBatch) -> Iterator[Tensor]:
    """Yield the pages of each request, ``[num_pages]``, int64."""
    first_page = 0
    for kv_len in batch.kv_lens_cpu:
        num_pages = pages_needed(kv_len, batch.page_size)
        yield batch.kv_indices[first_page : first_page + num_pages].long()
        first_page += num_pages


def inputs_of(
    keys: PagedBuffers,
    values: PagedBuffers | None,
    batch: PagedBatch,
    request: int,
    pages: Tensor,
    layer: int,
    queries: Tensor,
    past: History,
    model: ModelAttention,
) -> ScoreInputs:
    """Return what a policy is given of one request in one layer of the pool; values where there are any."""
    kv_len = batch.kv_lens_cpu[request]
    return ScoreInputs(
        queries=queries,
        keys=_gather(keys, layer, pages, kv_len),
        prompt_len=batch.prompt_lens_cpu[request],
        values=None if values is None else _gather(values, layer, pages, kv_len),
        logical_len=past.logical_len,
        state=None if past.kept_state is None else past.kept_state[layer],
        memory=None if past.memory is None else past.memory[layer],
        observed=past.observed,
        prompt_hits=None if past.prompt_hits is None else past.prompt_hits.of_layers(slice(layer, layer + 1)),
        layer=keys.first_layer + layer,
        first_kv_head=keys.first_kv_head,
        budget=batch.budgets_cpu[request],
        model=model,
    )


def score_inputs(
    keys: PagedBuffers,
    values: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    policy: Policy,
    history: Sequence[History],
    model: ModelAttention,
) -> Iterator[tuple[int, int, ScoreInputs]]:
    """Yield each request's number, each layer's and what the policy is to score there."""
    wanted = [keys.num_layers, batch.num_requests, batch.window]
    if queries.dim() != 5 or list(queries.shape[:3]) != wanted:
        raise ValueError(f"queries must be [*{wanted}, num_qo_heads, head_dim], got {list(queries.shape)}")
    read = values if needs_values(policy) else None
    for request, pages in enumerate(pages_of(batch)):
        for layer in range(keys.num_layers):
            own, past = queries[layer, request], history[request]
            yield request, layer, inputs_of(keys, read, batch, request, pages, layer, own, past, model)


def _gather(buffers: PagedBuffers, layer: int, pages: Tensor, num_tokens: int) -> Tensor:
    """Return the first tokens of some pages, dequantised, ``[num_tokens, num_kv_heads, head_dim]`` fp32. A copy."""
    return as_numbers(buffers, layer, buffers.tensors[layer][pages].flatten(0, 1)[:num_tokens])


def as_numbers(buffers: PagedBuffers, layer: int, stored: Tensor) -> Tensor:
    """Return what was copied out of one layer, dequantised, as fp32 of the same shape."""
    if buffers.dtype in FP8_DTYPES:
        return stored.view(buffers.dtype).float() * buffers.scales[layer]
    return stored.float()
