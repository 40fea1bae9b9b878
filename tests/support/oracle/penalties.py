"""What a request's sampling parameters make of logits, from their definitions, for the dense oracle."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch


def adjustment(
    params: Mapping[str, Any], prompt_ids: Sequence[int], stop_token_ids: Collection[int], *, lag: int
) -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor] | None:
    """Return what ``dense_generate`` takes as ``adjust``; None where nothing changes the logits.

    Args:
        params: Those of ``frequency_penalty``, ``presence_penalty``, ``repetition_penalty``, ``min_new_tokens`` and
            ``logit_bias`` that a request has.
        stop_token_ids: Tokens that ``min_new_tokens`` forbids.
        lag: 1 under overlap scheduling, where a token is counted one step late, and the prompt's last one in its stead.
    """
    if not set(params) - {"stop_token_ids"}:
        return None

    def adjust(logits: torch.Tensor, output_ids: Sequence[int]) -> torch.Tensor:
        logits = logits.clone()
        counted = [prompt_ids[-1], *output_ids[:-1]] if lag and output_ids else list(output_ids)
        for token, count in Counter(counted).items():
            logits[token] -= count * params.get("frequency_penalty", 0.0) + params.get("presence_penalty", 0.0)
            factor = params.get("repetition_penalty", 1.0)
            logits[token] = logits[token] * factor if logits[token] < 0 else logits[token] / factor
        if len(counted) < params.get("min_new_tokens", 0):
            logits[list(stop_token_ids)] = float("-inf")
        for token, bias in params.get("logit_bias", {}).items():
            logits[int(token)] += bias
        return logits

    return adjust
