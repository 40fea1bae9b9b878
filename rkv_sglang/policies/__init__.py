"""Policies: rules that score the tokens of a request. ``registry`` has them by name."""

from rkv_sglang.policies.base import (
    GivenScores,
    Places,
    Policy,
    Scored,
    ScoreInputs,
    as_scored,
    granularities_of,
    is_blind,
    is_stateful,
    keeps_prompt_hits,
    memory_numbers,
    needs_rope,
    needs_statistics,
    needs_values,
    observed_numbers,
    observes,
)
from rkv_sglang.policies.h2o import H2O
from rkv_sglang.policies.informed.beaconkv import BeaconKV
from rkv_sglang.policies.informed.gkv import GKV
from rkv_sglang.policies.informed.half import Half
from rkv_sglang.policies.informed.thinkv import ThinKV
from rkv_sglang.policies.informed.triattention import TriAttention
from rkv_sglang.policies.keydiff import KeyDiff
from rkv_sglang.policies.longflow import LongFlow
from rkv_sglang.policies.manifoldkv import ManifoldKV
from rkv_sglang.policies.random import Random
from rkv_sglang.policies.random_attention import RandomAttention
from rkv_sglang.policies.registry import POLICIES, default_settings, looks_at_nothing, make_policy
from rkv_sglang.policies.rkv import RKV
from rkv_sglang.policies.snapkv import SnapKV
from rkv_sglang.policies.streaming_llm import StreamingLLM
from rkv_sglang.policy_names import policy_names

__all__ = [
    "GKV",
    "H2O",
    "POLICIES",
    "RKV",
    "BeaconKV",
    "GivenScores",
    "Half",
    "KeyDiff",
    "LongFlow",
    "ManifoldKV",
    "Places",
    "Policy",
    "Random",
    "RandomAttention",
    "ScoreInputs",
    "Scored",
    "SnapKV",
    "StreamingLLM",
    "ThinKV",
    "TriAttention",
    "as_scored",
    "default_settings",
    "granularities_of",
    "is_blind",
    "is_stateful",
    "keeps_prompt_hits",
    "looks_at_nothing",
    "make_policy",
    "memory_numbers",
    "needs_rope",
    "needs_statistics",
    "needs_values",
    "observed_numbers",
    "observes",
    "policy_names",
]
