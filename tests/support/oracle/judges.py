"""What a document is judged by that has a task or is repeated, word by word: one attention row after another."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from tests.support.oracle.scores import ScoreFunction, ScoreInputs


def judged_by(judge: str, policy: ScoreFunction, *, length: int, num_behind: int) -> dict[str, Any]:
    """Return what ``dense_prefix`` is told of a judge: its score, and how many of the last tokens judge.

    Args:
        judge: ``"policy"``, ``"task"`` or ``"repeat"``.
        policy: The server's score.
        length: Tokens of the document.
        num_behind: Those behind it.
    """
    if judge == "policy":
        return {"score": policy}
    if judge == "task":
        return {"score": partial(task_scores, length=length), "num_judging": num_behind}
    return {"score": partial(repeat_scores, length=length), "num_judging": length}


def row(query: torch.Tensor, keys: torch.Tensor, places: Sequence[int], scale: float) -> dict[int, float]:
    """Return the attention of one query to keys in some places, ``[L, head_dim]``, by place."""
    weights = (keys[list(places)] @ query * scale).softmax(dim=0)
    return dict(zip(places, weights.tolist(), strict=True))


def task_scores(inputs: ScoreInputs, *, length: int) -> torch.Tensor:
    """Judge by all of the task (arXiv 2503.04973); ``window_queries`` are those of all of its tokens.

    Returns:
        ``[num_kv_heads, length]``, fp32.
    """
    keys, queries = inputs.keys.double(), inputs.window_queries.double()
    group = queries.shape[0] // keys.shape[0]
    scores = torch.zeros(keys.shape[0], length, dtype=torch.float64)
    for head in range(queries.shape[0]):
        for i, place in enumerate(range(length, keys.shape[1])):
            seen = range(place + 1)
            attention = row(queries[head, i], keys[head // group], seen, inputs.scale)
            for j in range(length):
                scores[head // group, j] += len(seen) * attention[j]
    return (scores / (group * queries.shape[1])).float()


def repeat_scores(inputs: ScoreInputs, *, length: int, chunk: int = 2048) -> torch.Tensor:
    """Judge by the document repeated (KVzip, arXiv 2505.23416); ``window_queries`` are those of the repeat.

    Returns:
        ``[num_kv_heads, length]``, fp32.
    """
    keys, queries = inputs.keys.double(), inputs.window_queries.double()
    group, first = queries.shape[0] // keys.shape[0], keys.shape[1] - length
    scores = torch.zeros(keys.shape[0], length, dtype=torch.float64)
    for head in range(queries.shape[0]):
        for i in range(length):
            begin = i // chunk * chunk
            own = [j for j in range(length) if begin <= j < begin + chunk]
            sinks = [j for j in range(4) if j < begin]
            instruction = list(range(length, first))
            repeat = [j for j in range(first, first + i + 1) if j >= first + begin - 8]
            attention = row(queries[head, i], keys[head // group], sinks + own + instruction + repeat, inputs.scale)
            for j in own:
                scores[head // group, j] = max(scores[head // group, j], attention[j])
    return scores.float()
