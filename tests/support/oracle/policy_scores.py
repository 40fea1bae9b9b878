"""The scores of all policies for the dense oracle, from their definitions, with everything written out in full."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.support.oracle.scores import ScoreFunction, ScoreInputs, redundancies, rkv_scores
from tests.support.oracle.thoughts import REASONING, Request, chosen_of, kind_of, sparsity_of_layer

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
    logits = torch.einsum("ngtd,njd->ngtj", by_group, earlier_keys) * inputs.scale
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


def _manifoldkv(inputs: ScoreInputs, *, mean_tokens: int = 4096) -> torch.Tensor:
    parts = torch.arange(inputs.keys.shape[1]) // mean_tokens
    same_part = (parts[:, None] == parts[None, :]).float()
    means = same_part @ inputs.keys / same_part.sum(dim=1, keepdim=True)
    return (inputs.keys - means).pow(2).sum(dim=-1).sqrt()[:, : _num_scored(inputs)]


def _longflow(inputs: ScoreInputs) -> torch.Tensor:
    num_kv_heads, _, head_dim = inputs.keys.shape
    newest = inputs.window_queries[:, -1].reshape(num_kv_heads, -1, head_dim)
    logits = torch.einsum("ngd,njd->ngj", newest, inputs.keys) * inputs.scale
    contributions = logits.softmax(dim=-1).sum(dim=1) * inputs.values.norm(p=1, dim=-1)
    return contributions[:, : _num_scored(inputs)]


def _gkv(
    inputs: ScoreInputs,
    *,
    importance_weight: float = 0.5,
    decay: float = 0.8,
    kernel_size: int = 7,
    similarity_threshold: float = 0.5,
) -> torch.Tensor:
    assert inputs.memory is not None
    num_kv_heads, _, head_dim = inputs.keys.shape
    num_scored = _num_scored(inputs)
    by_group = inputs.window_queries.reshape(num_kv_heads, -1, inputs.window_queries.shape[1], head_dim)
    logits = torch.einsum("ngtd,njd->ngtj", by_group, inputs.keys[:, :num_scored]) * inputs.scale
    received = logits.softmax(dim=-1).max(dim=1).values.mean(dim=1)
    pooled = F.max_pool1d(received, kernel_size, stride=1, padding=kernel_size // 2)
    remembered = pooled / pooled.max(dim=-1, keepdim=True).values
    positions = _scored_positions(inputs)
    old = decay * inputs.memory.gather(1, positions)
    # Nothing is remembered of a prompt.
    old[:, : inputs.prompt_len] = 0.0
    remembered = torch.maximum(remembered, old)
    inputs.memory.scatter_(1, positions, remembered)
    redundancy = redundancies(inputs.keys, similarity_threshold)
    shares = redundancy / redundancy.max(dim=-1, keepdim=True).values
    return importance_weight * remembered - (1 - importance_weight) * shares[:, :num_scored]


def _half(
    inputs: ScoreInputs,
    *,
    mix_lambda: float = 0.5,
    kernel_size: int = 7,
    similarity_threshold: float = 0.5,
    seed: int = 0,
) -> torch.Tensor:
    by_rkv = rkv_scores(
        inputs, mix_lambda=mix_lambda, kernel_size=kernel_size, similarity_threshold=similarity_threshold
    )
    logical_len = int(inputs.positions.max()) + 1
    drawn = [
        [_hash(j, logical_len, head, inputs.layer, seed) for j in range(by_rkv.shape[1])] for head in range(len(by_rkv))
    ]
    scores = torch.tensor(drawn, dtype=torch.float32)
    scores[:, : inputs.prompt_len] = 0.0
    num_best = -(-(inputs.budget - inputs.window_queries.shape[1]) // 2)
    ranked = by_rkv[:, inputs.prompt_len :].sort(dim=-1, descending=True, stable=True).indices
    return scores.scatter(1, ranked[:, :num_best] + inputs.prompt_len, 2.0)


def _triattention(inputs: ScoreInputs, *, statistics: Path, theta: float) -> torch.Tensor:
    """By the published sum over distances, from a file of statistics."""
    file = load_file(statistics)
    means = torch.view_as_complex(file["means"])[inputs.layer].to(torch.complex128)
    lengths = file["mean_lengths"][inputs.layer].double()
    num_kv_heads, _, head_dim = inputs.keys.shape
    num_scored = _num_scored(inputs)
    keys = inputs.keys[:, :num_scored].double()
    pairs = torch.complex(keys[..., : head_dim // 2], keys[..., head_dim // 2 :])
    inv_freqs = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    logical_len = int(inputs.positions.max()) + 1
    # [distances, query heads, pairs]
    ahead = torch.stack([torch.exp(1j * inv_freqs * (logical_len + 2**power)) for power in range(13)])
    queries = (ahead[:, None] * means[None]).unflatten(1, (num_kv_heads, -1))
    products = torch.einsum("xngf,njf->xngj", queries, pairs.conj()).real.mean(dim=0)
    spread = (lengths - means.abs()).unflatten(0, (num_kv_heads, -1))
    products = products + torch.einsum("ngf,njf->ngj", spread, pairs.abs())
    candidates = products[:, :, inputs.prompt_len :]
    deviations = candidates.std(dim=-1, keepdim=True, unbiased=False).clamp(min=1e-6)
    return ((products - candidates.mean(dim=-1, keepdim=True)) / deviations).amax(dim=1).float()


def _beaconkv(inputs: ScoreInputs, *, num_recent: int = 4, num_beacons: int = 28, theta: float) -> torch.Tensor:
    num_kv_heads, _, head_dim = inputs.keys.shape
    num_qo_heads, window, _ = inputs.window_queries.shape
    logical_len = int(inputs.positions.max()) + 1
    inv_freqs = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)

    def turn(vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``[heads, steps, head_dim]`` by the positions of the steps, in fp64."""
        cos, sin = ((function(positions[:, None] * inv_freqs)) for function in (torch.cos, torch.sin))
        first, second = vectors.double().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    still = turn(inputs.window_queries, -torch.arange(logical_len - window, logical_len).double())
    known = torch.cat([*inputs.beacons, still], dim=1)
    # [num_kv_heads, steps, all numbers of the group]
    points = known.unflatten(0, (num_kv_heads, -1)).transpose(1, 2).flatten(2)
    beacons = []
    for head in range(num_kv_heads):
        apart = torch.cdist(points[head], points[head], compute_mode="donot_use_mm_for_euclid_dist")
        chosen = [int((points[head] - points[head].mean(dim=0)).norm(dim=1).argmax())]
        for _ in range(min(num_beacons, len(apart)) - 1):
            nearest = apart[chosen].min(dim=0).values
            nearest[chosen] = -1.0
            chosen.append(int(nearest.argmax()))
        beacons.append(known.unflatten(0, (num_kv_heads, -1))[head][:, sorted(chosen)])
    kept = torch.cat(beacons)
    inputs.beacons[:] = [kept]
    ahead = turn(kept, torch.full((kept.shape[1],), logical_len).double())
    asking = torch.cat([ahead, inputs.window_queries[:, -num_recent:].double()], dim=1)
    logits = torch.einsum(
        "ngtd,njd->ngtj", asking.unflatten(0, (num_kv_heads, -1)), inputs.keys[:, : _num_scored(inputs)].double()
    )
    assert num_qo_heads % num_kv_heads == 0
    return (logits * inputs.scale).softmax(dim=-1).amax(dim=(1, 2)).float()


def _observe_thoughts(
    layers: Sequence[ScoreInputs],
    *,
    buffer: int = 128,
    negligible: float = 0.01,
    rounds: int = 4,
    execution_up_to: float | None = None,
    transition_above: float | None = None,
) -> None:
    """Leave the request's segments, and how many tokens each may keep, in what each layer remembers."""
    del rounds
    count = min(4, len(layers))
    looked_at = [layers[len(layers) * (2 * i + 1) // (2 * count)] for i in range(count)]
    kinds = []
    # What lies at the border of what is negligible may be counted either way.
    for factor in (1.0, 1.0 - 1e-5, 1.0 + 1e-5):
        shares = []
        for inputs in looked_at:
            num_kv_heads, _, head_dim = inputs.keys.shape
            queries = inputs.window_queries.reshape(num_kv_heads, -1, inputs.window_queries.shape[1], head_dim)
            shares.append(
                sparsity_of_layer(
                    queries.double().numpy(),
                    inputs.keys.double().numpy(),
                    negligible * factor,
                    lambda product, scale=inputs.scale: product * scale,
                )
            )
        kinds.append(kind_of(sum(shares) / len(shares), execution_up_to, transition_above))
    first = layers[0]
    request: Request = first.beacons[0] if first.beacons else Request()
    window = first.window_queries.shape[1]
    num_candidates = first.keys.shape[1] - window - first.prompt_len
    plan = request.compact(kinds[0], num_candidates, first.budget - window, buffer)
    request.doubts = [0.0] if len(set(kinds)) > 1 else []
    for inputs in layers:
        inputs.beacons[:] = [request, plan]


def _thinkv(inputs: ScoreInputs, *, buffer: int = 128, rounds: int = 4, **_: Any) -> torch.Tensor:
    """Numbers above 0 for what stays, 0 for the rest; near 0 where a rounding error may have chosen others."""
    num_scored, window = _num_scored(inputs), inputs.window_queries.shape[1]
    room = inputs.budget - window
    if inputs.beacons:
        request, plan = inputs.beacons
    else:
        request = Request()
        plan = request.compact(REASONING, num_scored - inputs.prompt_len, room, buffer)
    scores = torch.zeros(len(inputs.keys), num_scored)
    for head, keys in enumerate(inputs.keys.double().numpy()):
        chosen = chosen_of(keys[inputs.prompt_len : num_scored], plan, rounds, request.doubts)
        newest_first = sorted(range(len(chosen)), key=lambda index: (not chosen[index], -index))
        margin = max(3e-3 * min([*request.doubts, 1.0]), 1e-12)
        if inputs.beacons:
            scores[head, [inputs.prompt_len + index for index in newest_first[:room]]] = margin
        else:
            # Of a prompt's tokens only some are candidates, so all are ranked.
            for rank, index in enumerate(newest_first):
                scores[head, inputs.prompt_len + index] = margin * (len(newest_first) - rank)
    return scores


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
    "rkv": partial(rkv_scores, mix_lambda=0.5, kernel_size=7, similarity_threshold=0.5),
    "snapkv": _snapkv,
    "h2o": _h2o,
    "streaming_llm": _streaming_llm,
    "keydiff": _keydiff,
    "manifoldkv": _manifoldkv,
    "longflow": _longflow,
    "random": _random,
    "gkv": _gkv,
    "half": _half,
    "triattention": _triattention,
    "beaconkv": _beaconkv,
    "random_attention": _random_attention,
    "thinkv": _thinkv,
}
# It looks at all layers before any is scored.
_thinkv.observe = _observe_thoughts  # type: ignore[attr-defined]
