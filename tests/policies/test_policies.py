"""Policies by name: what a config builds, and what the built policy scores."""

import pytest
import torch

from rkv_sglang.algorithm import reference
from rkv_sglang.config import POLICY_NAMES, PolicyConfig
from rkv_sglang.policies import POLICIES, RKV, ScoreInputs, make_policy
from tests.algorithm.cases import fresh_seed, make_keys, make_queries


def test_every_name_of_the_config_but_none_has_a_policy():
    assert {"none", *POLICIES} == set(POLICY_NAMES)


def test_rkv_takes_its_parameters_from_the_config():
    config = PolicyConfig(mix_lambda=0.7, kernel_size=3, similarity_threshold=0.25)
    assert make_policy(config) == RKV(mix_lambda=0.7, kernel_size=3, similarity_threshold=0.25)
    assert make_policy(PolicyConfig()) == RKV()


def test_rkv_scores_as_the_paper_words_it():
    torch.manual_seed(fresh_seed())
    policy = RKV(mix_lambda=0.4, kernel_size=3, similarity_threshold=0.3)
    keys = make_keys("clustered", (97, 2, 16), dtype=torch.bfloat16, threshold=0.3)
    inputs = ScoreInputs(queries=make_queries(keys, 5, 2), keys=keys, prompt_len=20)
    literal = reference.rkv_scores(
        inputs.queries, keys, mix_lambda=0.4, kernel_size=3, similarity_threshold=0.3, dtype=torch.float64
    )
    scores = policy.score(inputs)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), literal, rtol=1e-5, atol=1e-6)


def test_no_policy_is_built_for_none():
    with pytest.raises(ValueError, match=r"policy 'none' scores nothing: choose one of rkv"):
        make_policy(PolicyConfig(policy="none"))


@pytest.mark.parametrize("prompt_len", [-1, 7])
def test_a_prompt_that_does_not_fit_is_refused(prompt_len):
    with pytest.raises(ValueError, match=f"prompt_len {prompt_len} and a window of 4 queries do not fit into L = 10"):
        ScoreInputs(queries=torch.zeros(4, 2, 8), keys=torch.zeros(10, 2, 8), prompt_len=prompt_len)
