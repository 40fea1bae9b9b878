"""The scores of all policies for the dense oracle, from their definitions, with everything written out in full."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from tests.support.oracle.scores import ScoreFunction, ScoreInputs, rkv_scores

EPS = 1e-8


def score_function(policy: str, **parameters: Any) -> ScoreFunction:
    """Return the score of a policy by its name; parameters that are not given have their defaults."""
    return partial(_SCORES[policy], **parameters)


def _window_attention(inputs: ScoreInputs) -> torch.Tensor:
    """Softmax of every window query over what came before the window, ``[num_kv_heads, window, L - window]``.

    The query heads of a group are merged into their largest logit first.
    """
    num_kv_heads, resident_len, head_dim = inputs.keys.shape
    window = inputs.window_queries.shape[1]
    earlier_keys = inputs.keys[:, : resident_len - window]
    by_group = inputs.window_queries.reshape(num_kv_heads, -1, window, head_dim)
    logits = torch.einsum("ngtd,njd->ngtj", by_group, earlier_keys) * head_dim**-0.5
    return logits.max(dim=1).values.softmax(dim=-1)


def _snapkv(inputs: ScoreInputs, *, kernel_size: int = 7) -> torch.Tensor:
    received = _window_attention(inputs).mean(dim=1)
    padded = F.pad(received, (kernel_size // 2, kernel_size // 2), value=float("-inf"))
    return padded.unfold(-1, kernel_size, 1).amax(dim=-1)


def _h2o(inputs: ScoreInputs) -> torch.Tensor:
    assert inputs.memory is not None
    received = _window_attention(inputs).sum(dim=1)
    scored_positions = inputs.positions[:, : received.shape[1]]
    inputs.memory.scatter_add_(1, scored_positions, received)
    return inputs.memory.gather(1, scored_positions)


def _streaming_llm(inputs: ScoreInputs, *, num_sinks: int = 4) -> torch.Tensor:
    positions = _scored_positions(inputs)
    # Sinks come before all others, the first one first.
    return torch.where(positions < num_sinks, 2**20 - positions, positions).float()


def _keydiff(inputs: ScoreInputs) -> torch.Tensor:
    directions = inputs.keys / (inputs.keys.norm(dim=-1, keepdim=True) + EPS)
    mean = directions.mean(dim=1, keepdim=True)
    cosines = (directions * mean).sum(dim=-1) / (mean.norm(dim=-1) + EPS)
    return -cosines[:, : _num_scored(inputs)]


def _manifoldkv(inputs: ScoreInputs, *, mean_tokens: int = 16384) -> torch.Tensor:
    mean = inputs.keys[:, max(0, inputs.keys.shape[1] - mean_tokens) :].mean(dim=1, keepdim=True)
    return (inputs.keys - mean).pow(2).sum(dim=-1).sqrt()[:, : _num_scored(inputs)]


def _longflow(inputs: ScoreInputs) -> torch.Tensor:
    num_kv_heads, _, head_dim = inputs.keys.shape
    newest = inputs.window_queries[:, -1].reshape(num_kv_heads, -1, head_dim)
    logits = torch.einsum("ngd,njd->ngj", newest, inputs.keys) * head_dim**-0.5
    contributions = logits.softmax(dim=-1).sum(dim=1) * inputs.values.norm(p=1, dim=-1)
    return contributions[:, : _num_scored(inputs)]


def _random(inputs: ScoreInputs, *, seed: int = 0) -> torch.Tensor:
    return torch.tensor(
        [[_hash(position, seed) for position in row] for row in _scored_positions(inputs).tolist()],
        dtype=torch.float32,
    )


def _random_attention(inputs: ScoreInputs, *, seed: int = 0, whole_request: bool = False) -> torch.Tensor:
    num_seen = (inputs.positions[:, -1] + 1).tolist()
    of_head = [(num, seed) if whole_request else (num, head, inputs.layer, seed) for head, num in enumerate(num_seen)]
    return torch.tensor(
        [[_hash(index, *others) for index in range(_num_scored(inputs))] for others in of_head], dtype=torch.float32
    )


@cache
def _hash(*numbers: int) -> float:
    mixed = 0
    for number in numbers:
        mixed ^= number
        for _ in range(2):
            mixed = ((mixed >> 16) ^ mixed) * 0x45D9F3B % 2**32
        mixed = (mixed >> 16) ^ mixed
    return (mixed >> 8) / 2**24


def _num_scored(inputs: ScoreInputs) -> int:
    return inputs.keys.shape[1] - inputs.window_queries.shape[1]


def _scored_positions(inputs: ScoreInputs) -> torch.Tensor:
    return inputs.positions[:, : _num_scored(inputs)]


_SCORES: dict[str, Callable[..., torch.Tensor]] = {
    "rkv": partial(rkv_scores, mix_lambda=0.1, kernel_size=7, similarity_threshold=0.5),
    "snapkv": _snapkv,
    "h2o": _h2o,
    "streaming_llm": _streaming_llm,
    "keydiff": _keydiff,
    "manifoldkv": _manifoldkv,
    "longflow": _longflow,
    "random": _random,
    "random_attention": _random_attention,
}
