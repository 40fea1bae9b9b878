"""The matrix of policies and parameters that all tests of policies share."""

from typing import Any

from rkv_sglang.config import PolicyConfig
from rkv_sglang.policies import Policy, make_policy

RKV_DEFAULTS = {"mix_lambda": 0.1, "kernel_size": 7, "similarity_threshold": 0.5}

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
    ("manifoldkv", {"mean_tokens": 16384}),
    ("manifoldkv", {"mean_tokens": 13}),
    ("longflow", {}),
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
