"""One layer of a request that is compacted again and again, with what a compaction must hand to a policy and carry."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.selection import select_kept
from rkv_sglang.policies import Policy, ScoreInputs, as_scored, is_stateful, needs_values, observes


@dataclass(frozen=True)
class Tokens:
    """All tokens of a request by logical position.

    Attributes:
        queries: ``[num_tokens, num_qo_heads, head_dim]``.
        keys: ``[num_tokens, num_kv_heads, head_dim]``.
        values: ``[num_tokens, num_kv_heads, head_dim]``.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Step:
    """One compaction.

    Attributes:
        inputs: What the policy was given.
        scores: What it returned.
        positions: Logical position of each resident token before, ``[num_kv_heads, L]``.
        kept_positions: The same after, ``[num_kv_heads, prompt_len + budget]``.
    """

    inputs: ScoreInputs
    scores: Tensor
    positions: Tensor
    kept_positions: Tensor


def random_tokens(num_tokens: int, num_kv_heads: int, gqa_group_size: int, head_dim: int) -> Tokens:
    """Draw tokens with a common key direction, some near-duplicates and some values of zero."""
    keys = torch.randn(num_kv_heads, head_dim) + torch.randn(num_tokens, num_kv_heads, head_dim)
    keys[::7] = keys[torch.randint(num_tokens, (len(keys[::7]),))]
    values = torch.randn(num_tokens, num_kv_heads, head_dim) * torch.rand(num_tokens, 1, 1)
    values[::11] = 0.0
    return Tokens(2 * torch.randn(num_tokens, num_kv_heads * gqa_group_size, head_dim), keys, values)


def replay(
    policy: Policy,
    tokens: Tokens,
    *,
    prompt_len: int,
    budget: int,
    buffer: int,
    window: int,
    model: ModelAttention = PLAIN_ATTENTION,
) -> Iterator[Step]:
    """Decode ``tokens`` and compact whenever ``budget + buffer`` generated ones are resident."""
    num_kv_heads = tokens.keys.shape[1]
    positions = torch.arange(prompt_len).expand(num_kv_heads, -1)
    state = memory = observed = None
    for logical_len in range(prompt_len + 1, len(tokens.keys) + 1):
        positions = torch.cat([positions, torch.full((num_kv_heads, 1), logical_len - 1)], dim=1)
        if positions.shape[1] < prompt_len + budget + buffer:
            continue
        rows = positions.T.unsqueeze(2)
        inputs = ScoreInputs(
            queries=tokens.queries[logical_len - window : logical_len],
            keys=tokens.keys.take_along_dim(rows, dim=0),
            prompt_len=prompt_len,
            values=tokens.values.take_along_dim(rows, dim=0) if needs_values(policy) else None,
            logical_len=logical_len,
            state=state,
            budget=budget,
            memory=memory,
            observed=observed,
            model=model,
        )
        if observes(policy):
            observed = policy.observe(iter([inputs]))  # type: ignore[attr-defined]
            inputs = replace(inputs, observed=observed)
        scored = as_scored(policy.score(inputs))
        scores, memory = scored.scores, scored.memory
        kept_indices = select_kept(scores, prompt_len, window, budget)
        if is_stateful(policy):
            # The window is last in every row and has no scores yet.
            state = scored.state[:, prompt_len:].gather(1, kept_indices[:, : budget - window])
        kept = positions[:, prompt_len:].gather(1, kept_indices)
        kept_positions = torch.cat([positions[:, :prompt_len], kept], dim=1)
        yield Step(inputs, scores, positions, kept_positions)
        positions = kept_positions
