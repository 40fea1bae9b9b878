"""One compaction of many requests, on whatever device the pool is: the one place that chooses what runs.

On a GPU, this package's policies take a constant number of launches for all layers and heads; those of other packages
score in torch, layer by layer, and share the move. On a CPU everything is torch.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.selection import select_kept
from rkv_sglang.kernels.gathered import score_inputs
from rkv_sglang.kernels.move import move_kept_paged, move_kept_torch
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score.config import padded_head_dim, padded_window
from rkv_sglang.kernels.score.scorers import PAGED_SCORERS, History, PagedInputs, scored_paged, state_of_kept
from rkv_sglang.kernels.select import select_kept_paged
from rkv_sglang.kernels.transfer import to_device
from rkv_sglang.policies import Policy, Scored, as_scored, is_stateful


@dataclass(frozen=True)
class Kept:
    """Tokens that a compaction kept.

    Attributes:
        indices: Of the generated tokens, ascending, then -1 past the request's budget,
            ``[num_layers, num_requests, num_kv_heads, max_budget]``, int32.
        state: Per request the next ``History.kept_state``; None unless the policy is stateful.
        memory: Per request the next ``History.memory``; None unless the policy remembers.
    """

    indices: Tensor
    state: tuple[Tensor, ...] | None = None
    memory: tuple[Tensor, ...] | None = None


def runs_triton(buffers: PagedBuffers) -> bool:
    """Return whether this pool is compacted by Triton kernels."""
    return buffers.device.type == "cuda"


def working_bytes_per_token(keys: PagedBuffers, window: int) -> int:
    """Return about how much memory ``compact_paged`` holds besides its arguments for each resident token of a batch.

    Per layer and head: three fp32 numbers, an int64 and an index if the token is kept, and for each block of at least
    32 tokens a row of fp32 sums of keys, two of the window and one number more.
    """
    block_sums = 4 * padded_head_dim(keys.head_dim) + 8 * padded_window(window) + 4
    return keys.num_layers * keys.num_kv_heads * (24 + block_sums // 32)


@torch.no_grad()
def compact_paged(
    keys: PagedBuffers,
    values: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    policy: Policy,
    history: Sequence[History] | None = None,
    model: ModelAttention = PLAIN_ATTENTION,
) -> Kept:
    """Score, choose and move: every request keeps its prompt and its budget of generated tokens.

    Mutates the pool in each request's tokens from ``prompt_len`` to ``prompt_len + budget``, and those
    ``History.prompt_hits`` that are not filled. Queues no device-to-host sync if the policy has a paged scorer.

    Args:
        keys, values: All layers of the pool, on one device.
        batch: Which requests, pages and budgets.
        queries: The window's queries after RoPE, oldest first,
            ``[num_layers, num_requests, window, num_qo_heads, head_dim]``, floating.
        policy: Scores the tokens.
        history: One entry per request; default: nothing was ever evicted.
        model: How the model attends.

    Returns:
        What was kept of each request, and for a stateful policy its state.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    if not runs_triton(keys):
        kept = choose_kept_torch(keys, values, batch, queries, policy, history, model)
        move_kept_torch(keys, values, batch, kept.indices)
        return kept
    scorer = PAGED_SCORERS.get(type(policy))
    if scorer is None:
        kept = choose_kept_torch(keys, values, batch, queries, policy, history, model)
    else:
        past = _nothing_evicted(batch) if history is None else history
        inputs = PagedInputs(keys=keys, values=values, batch=batch, queries=queries, history=past, model=model)
        scored = scored_paged(scorer(policy, inputs))
        sliding = model.sliding_among(keys.first_layer, keys.num_layers)
        if sliding:
            # The later, the better. Columns are fewer than fp32 has whole numbers.
            columns = torch.arange(batch.num_tokens, dtype=torch.float32, device=keys.device)
            scored.scores[to_device(sliding, torch.int64, keys.device)] = columns
        indices = select_kept_paged(scored.scores, batch)
        state = state_of_kept(scored.state, indices, batch) if is_stateful(policy) else None
        kept = Kept(indices, state, scored.memory)
    move_kept_paged(keys, values, batch, kept.indices)
    return kept


@torch.no_grad()
def score_paged(
    keys: PagedBuffers,
    values: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    policy: Policy,
    history: Sequence[History],
    model: ModelAttention = PLAIN_ATTENTION,
) -> Tensor:
    """Score only; arguments as in ``compact_paged``, and the pool is only read.

    Returns:
        ``[num_layers, num_kv_heads, num_tokens]``, fp32, columns as ``batch.token_indptr`` has them; those of windows
        are no scores, and layers that attend to the latest tokens alone have 0.
    """
    scorer = PAGED_SCORERS.get(type(policy)) if runs_triton(keys) else None
    if scorer is not None:
        inputs = PagedInputs(keys=keys, values=values, batch=batch, queries=queries, history=history, model=model)
        scores = scored_paged(scorer(policy, inputs)).scores
    else:
        scores = torch.full((keys.num_layers, keys.num_kv_heads, batch.num_tokens), -torch.inf, device=keys.device)
        starts = [0, *itertools.accumulate(batch.kv_lens_cpu)]
        for request, layer, own in _scores_torch(keys, values, batch, queries, policy, history, model):
            scores[layer, :, starts[request] : starts[request] + own.scores.shape[1]] = own.scores
    sliding = model.sliding_among(keys.first_layer, keys.num_layers)
    if sliding:
        scores[to_device(sliding, torch.int64, keys.device)] = 0.0
    return scores


def _nothing_evicted(batch: PagedBatch) -> list[History]:
    return [History(kv_len) for kv_len in batch.kv_lens_cpu]


def choose_kept_torch(
    keys: PagedBuffers,
    values: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    policy: Policy,
    history: Sequence[History] | None = None,
    model: ModelAttention = PLAIN_ATTENTION,
) -> Kept:
    """Choose as ``compact_paged`` does, by the policy's own score, request by request and layer by layer."""
    history = _nothing_evicted(batch) if history is None else history
    shape = (keys.num_layers, batch.num_requests, keys.num_kv_heads, batch.max_budget)
    kept_indices = torch.full(shape, -1, dtype=torch.int32, device=keys.device)
    kept_state: list[list[Tensor]] = [[] for _ in batch.kv_lens_cpu]
    memory: list[list[Tensor]] = [[] for _ in batch.kv_lens_cpu]
    for request, layer, scored in _scores_torch(keys, values, batch, queries, policy, history, model):
        prompt_len, budget = batch.prompt_lens_cpu[request], batch.budgets_cpu[request]
        scores = scored.scores
        if keys.first_layer + layer in model.sliding_layers:
            scores = torch.arange(scores.shape[1], dtype=torch.float32, device=keys.device).expand_as(scores)
        kept = select_kept(scores, prompt_len, batch.window, budget)
        kept_indices[layer, request, :, :budget] = kept
        kept_state[request].append(scored.state.gather(1, prompt_len + kept[:, : budget - batch.window]))
        memory[request] += [] if scored.memory is None else [scored.memory]
    return Kept(
        kept_indices,
        tuple(map(torch.stack, kept_state)) if is_stateful(policy) else None,
        tuple(map(torch.stack, memory)) if memory[0] else None,
    )


def _scores_torch(
    keys: PagedBuffers,
    values: PagedBuffers,
    batch: PagedBatch,
    queries: Tensor,
    policy: Policy,
    history: Sequence[History],
    model: ModelAttention,
) -> Iterator[tuple[int, int, Scored]]:
    """Yield each request's number, each layer's and what the policy itself scores there."""
    for request, layer, inputs in score_inputs(keys, values, batch, queries, policy, history, model):
        yield request, layer, as_scored(policy.score(inputs))
