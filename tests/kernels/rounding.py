"""How far scores in fp32 may be off where what they are made of nearly cancels out."""

import torch
from torch import Tensor

from rkv_sglang.policies import ScoreInputs
from rkv_sglang.policies.informed.triattention import expected_queries, lengthwise


def rounding_of_triattention(inputs: ScoreInputs) -> Tensor:
    """How far rounded scores may be off, as ``best_of_group`` returns them; infinite where all candidates are alike.

    A logit is off by a share of what it is summed up from, and a score by that in deviations: of the candidates' mean
    once, and of their deviation as often as the score has deviations.
    """
    rope, statistics = inputs.model.rope, inputs.model.statistics
    assert rope is not None and statistics is not None
    of_layer = statistics.of_layers(inputs.layer, 1)
    turned = expected_queries(rope, of_layer)[0] * rope.turns([len(inputs.keys) + inputs.evicted_tokens])[0]
    num_kv_heads = inputs.keys.shape[1]
    # [num_kv_heads, gqa_group_size, num_pairs] times [num_kv_heads, num_pairs, num_tokens]
    queries = turned.view(num_kv_heads, -1, rope.num_pairs)
    spread = lengthwise(rope, of_layer)[0].double().view(queries.shape)
    pairs = rope.pairs(inputs.keys[: len(inputs.keys) - len(inputs.queries)]).to(torch.complex128).permute(1, 2, 0)
    logits = queries.real @ pairs.real + queries.imag @ pairs.imag + spread @ pairs.abs()
    parts = queries.real.abs() @ pairs.real.abs() + queries.imag.abs() @ pairs.imag.abs() + spread @ pairs.abs()
    error = 4 * torch.finfo(torch.float32).eps * parts.amax(dim=2, keepdim=True)
    candidates = logits[:, :, inputs.prompt_len :]
    deviation = candidates.std(dim=2, keepdim=True, correction=0)
    scores = (logits - candidates.mean(dim=2, keepdim=True)) / deviation
    off = error / (deviation - error) * (1 + scores.abs())
    return torch.where(deviation > 10 * error, off, torch.inf).amax(dim=1)


def error_scale(keys: Tensor) -> float:
    """How much a rounded sum of unit keys is magnified where they nearly cancel out."""
    unit = keys.double() / (keys.double().norm(dim=-1, keepdim=True) + 1e-8)
    return float(1 + 1 / (unit.mean(dim=0).norm(dim=-1).min() + 1e-8))
