"""Greedy decoding of any transformers model without a cache: what was dropped is masked out for who comes later."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.support.oracle.decoder import load_model, one_thread
from tests.support.oracle.masked_forward import masked_forward
from tests.support.oracle.scores import ScoreFunction, ScoreInputs


def masked_generate(
    model_path: Path,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    budget: int,
    buffer: int,
    window: int,
    block: int,
    score: ScoreFunction,
) -> tuple[list[int], list[float], int]:
    """Generate with one choice for all layers and heads, in whole blocks, by a score of places alone.

    Returns:
        The output tokens, of each by how much its logit is above the second best, and how many compactions there were.
    """
    model = load_model(model_path)
    num_layers, num_kv_heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    prompt_len, total = len(prompt_ids), len(prompt_ids) + max_new_tokens
    ids, resident = list(prompt_ids), list(range(prompt_len))
    # Row t: what the token at position t attends to.
    visible = torch.zeros(total, total, dtype=torch.bool)
    visible[:prompt_len, :prompt_len] = torch.ones(prompt_len, prompt_len, dtype=torch.bool).tril()
    gaps: list[float] = []
    num_compactions = 0
    with one_thread():
        while True:
            num_seen = len(ids)
            mask = visible[:num_seen, :num_seen].expand(num_layers, num_kv_heads, -1, -1)
            (best, second), (token, _) = (pair.tolist() for pair in masked_forward(model, ids, mask).logits[-1].topk(2))
            gaps.append(best - second)
            ids.append(token)
            if len(ids) == total:
                return ids[prompt_len:], gaps, num_compactions
            if len(resident) - prompt_len >= budget + buffer:
                resident = _without_lowest(resident, prompt_len, budget, window, block, score)
                num_compactions += 1
            resident.append(num_seen)
            visible[num_seen, resident] = True


def _without_lowest(
    resident: list[int], prompt_len: int, budget: int, window: int, block: int, score: Callable[..., torch.Tensor]
) -> list[int]:
    length = len(resident)
    nothing = torch.zeros(1, length, 1)
    scores = score(ScoreInputs(nothing, nothing, nothing[:, :window], torch.tensor([resident]), prompt_len))[0].double()
    starts = [i for i in range(0, length, block) if i >= prompt_len and i + block <= length - window]
    ranked = sorted(starts, key=lambda i: (float(scores[i : i + block].mean()), i))
    gone = {i + offset for i in ranked[: (length - prompt_len - budget) // block] for offset in range(block)}
    return [position for i, position in enumerate(resident) if i not in gone]
