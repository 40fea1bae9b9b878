"""The matrix of policies and parameters that all tests of policies share."""

from typing import Any

import torch

from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.algorithm.rope import Rope
from rkv_sglang.config import PolicyConfig
from rkv_sglang.policies import Policy, make_policy

RKV_DEFAULTS = {"mix_lambda": 0.5, "kernel_size": 7, "similarity_threshold": 0.5}
THINKV_DEFAULTS = {
    "buffer": 128,
    "negligible": 0.01,
    "rounds": 4,
    "execution_up_to": None,
    "transition_above": None,
    "statistics": "",
    "questions": 32,
    "answer_tokens": 2048,
}
# Between them lies what random queries do.
THOUGHT_BOUNDS = {"execution_up_to": 0.35, "transition_above": 0.45}

# Every policy with its defaults, spelt out, and with other parameters.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("rkv", RKV_DEFAULTS),
    ("rkv", RKV_DEFAULTS | {"mix_lambda": 0.9, "kernel_size": 1}),
    ("snapkv", {"kernel_size": 7}),
    ("snapkv", {"kernel_size": 1}),
    ("h2o", {}),
    ("streaming_llm", {"num_sinks": 4}),
    ("streaming_llm", {"num_sinks": 0}),
    ("streaming_llm", {"num_sinks": 37}),
    ("keydiff", {}),
    ("manifoldkv", {"mean_tokens": 4096}),
    ("manifoldkv", {"mean_tokens": 13}),
    ("longflow", {}),
    ("half", {**RKV_DEFAULTS, "seed": 0}),
    ("half", {"mix_lambda": 0.6, "kernel_size": 1, "similarity_threshold": 0.5, "seed": 2**32 - 1}),
    ("gkv", {"importance_weight": 0.5, "decay": 0.8, "kernel_size": 7, "similarity_threshold": 0.5}),
    ("gkv", {"importance_weight": 0.9, "decay": 1.0, "kernel_size": 1, "similarity_threshold": 0.5}),
    ("beaconkv", {"num_recent": 4, "num_beacons": 28}),
    ("beaconkv", {"num_recent": 1, "num_beacons": 3}),
    ("triattention", {"statistics": "", "questions": 32, "answer_tokens": 2048}),
    ("thinkv", THINKV_DEFAULTS),
    ("thinkv", THINKV_DEFAULTS | {"buffer": 9, "rounds": 1, "negligible": 0.3} | THOUGHT_BOUNDS),
    ("random", {"seed": 0}),
    ("random", {"seed": 2**32 - 1}),
    ("random_attention", {"seed": 0}),
    ("random_attention", {"seed": 2**32 - 1}),
]


def case_id(case: tuple[str, dict[str, Any]]) -> str:
    name, parameters = case
    return "-".join([name, *(f"{key}={value}" for key, value in parameters.items())])


def policy_of(name: str, parameters: dict[str, Any]) -> Policy:
    return make_policy(PolicyConfig(policy=name, parameters=parameters))


def model_with_statistics(
    num_layers: int, num_qo_heads: int, head_dim: int, *, logit_scale: float | None = None, logit_cap: float = 0.0
) -> ModelAttention:
    """A model that turns three quarters of a head's numbers, and whose queries are mostly alike."""
    num_pairs = max(1, 3 * head_dim // 8)
    rope = Rope(inv_freqs=tuple(0.5 ** (1.3 * f) for f in range(num_pairs)), factor=1.1)
    means = torch.randn(num_layers, num_qo_heads, num_pairs, dtype=torch.complex64)
    statistics = QueryStatistics(means, means.abs() + torch.rand(means.shape))
    return ModelAttention(logit_scale=logit_scale, logit_cap=logit_cap, rope=rope, statistics=statistics)


def usual_queries(model: ModelAttention, layer: int, heads: slice) -> tuple[Any, Any, list[float], float] | None:
    """What ``OneHead.usual`` is of some query heads; None for a model without statistics."""
    if model.rope is None or model.statistics is None:
        return None
    means, lengths = (
        part[layer, heads].cpu().numpy() for part in (model.statistics.means, model.statistics.mean_lengths)
    )
    return means, lengths, list(model.rope.inv_freqs), model.rope.factor
