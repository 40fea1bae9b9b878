"""Policies: rules that score the tokens of a request. ``registry`` has them by name."""

from rkv_sglang.policies.base import (
    Places,
    Policy,
    ScoreInputs,
    granularities_of,
    is_blind,
    is_stateful,
    keeps_prompt_hits,
    needs_values,
)
from rkv_sglang.policies.h2o import H2O
from rkv_sglang.policies.keydiff import KeyDiff
from rkv_sglang.policies.longflow import LongFlow
from rkv_sglang.policies.manifoldkv import ManifoldKV
from rkv_sglang.policies.random import Random
from rkv_sglang.policies.random_attention import RandomAttention
from rkv_sglang.policies.registry import POLICIES, default_settings, make_policy
from rkv_sglang.policies.rkv import RKV
from rkv_sglang.policies.snapkv import SnapKV
from rkv_sglang.policies.streaming_llm import StreamingLLM
from rkv_sglang.policy_names import policy_names

__all__ = [
    "H2O",
    "POLICIES",
    "RKV",
    "KeyDiff",
    "LongFlow",
    "ManifoldKV",
    "Places",
    "Policy",
    "Random",
    "RandomAttention",
    "ScoreInputs",
    "SnapKV",
    "StreamingLLM",
    "default_settings",
    "granularities_of",
    "is_blind",
    "is_stateful",
    "keeps_prompt_hits",
    "make_policy",
    "needs_values",
    "policy_names",
]
