"""A policy is tried before it serves: whatever is no score is named in one line, and every policy here passes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.parts import refuse_split_observations
from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.policy_trial import score_problem
from rkv_sglang.policies import POLICIES, Scored, make_policy
from tests.policies.cases import model_with_statistics

SHAPES: tuple[dict[str, int], ...] = (
    {"window": 8, "budget": 32, "capacity": 48, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "v_head_dim": 16},
    {"window": 1, "budget": 2, "capacity": 3, "num_qo_heads": 1, "num_kv_heads": 1, "head_dim": 8, "v_head_dim": 4},
)


@pytest.mark.parametrize("shape", SHAPES, ids=["several heads", "one head"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_here_passes(name: str, shape: dict[str, int]) -> None:
    model = model_with_statistics(1, shape["num_qo_heads"], shape["head_dim"])
    assert score_problem(make_policy(PolicyConfig(policy=name)), **shape, model=model, device="cpu") is None


@dataclass
class Some:
    """Scores right, and hands out what a test makes of it."""

    change: Any

    def score(self, inputs: Any) -> Any:
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        return self.change(torch.zeros(num_kv_heads, num_tokens - len(inputs.queries)))


def without_a_state(scores: torch.Tensor) -> Scored:
    return Scored(scores, scores[:, 1:])


def raising(scores: torch.Tensor) -> None:
    raise KeyError("two\nlines")


def nan_behind_the_prompt(scores: torch.Tensor) -> torch.Tensor:
    scores[-1, -1] = torch.nan
    return scores


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (raising, "its score raises KeyError: 'two\\nlines'"),
        (lambda scores: None, "its score is of type NoneType instead of a tensor [2, 42] of torch.float32"),
        (lambda scores: scores.tolist(), "its score is of type list instead of"),
        (lambda scores: scores[:, 1:], "its score is [2, 41] of torch.float32 instead of [2, 42]"),
        (lambda scores: scores[:1], "its score is [1, 42] of"),
        (lambda scores: scores.flatten(), "its score is [84] of"),
        (lambda scores: scores.double(), "its score is [2, 42] of torch.float64 instead of"),
        (lambda scores: scores.long(), "its score is [2, 42] of torch.int64 instead of"),
        (lambda scores: scores.to("meta"), "its score is on meta instead of cpu"),
        (lambda scores: Scored(scores, scores > 0), "its state is [2, 42] of torch.bool instead of"),
        (without_a_state, "its state is [2, 41] of torch.float32 instead of [2, 42]"),
        (nan_behind_the_prompt, "its score has NaN in it"),
    ],
)
def test_what_is_no_score_is_named_in_one_line(change: Any, problem: str) -> None:
    found = score_problem(Some(change), **SHAPES[0], device="cpu")
    assert found is not None and found.startswith(problem) and "\n" not in found


@pytest.mark.parametrize("change", [lambda scores: scores > 0, lambda scores: Scored(scores > 0, scores)])
def test_a_choice_may_stand_in_the_place_of_scores(change: Any) -> None:
    assert score_problem(Some(change), **SHAPES[0], device="cpu") is None


def test_what_the_prompt_scores_is_looked_at_by_nobody() -> None:
    policy = Some(lambda scores: scores.index_fill(1, torch.tensor([0, 1]), torch.nan))
    assert score_problem(policy, **SHAPES[0], device="cpu") is None


@dataclass
class SomeObserver:
    """Observes what a test makes of it, and scores by that."""

    observed: Any

    def observed_layers(self, layers: Any) -> Any:
        return layers[1:]

    def observed_numbers(self, budget: int, window: int) -> int:
        return budget - window

    def observe(self, layers: Any) -> Any:
        (only,) = layers
        return self.observed(only.keys)

    def score(self, inputs: Any) -> Any:
        num_tokens, num_kv_heads, _ = inputs.keys.shape
        return inputs.observed[0].expand(num_kv_heads, num_tokens - len(inputs.queries))


@pytest.mark.parametrize(
    ("observed", "problem"),
    [
        (lambda keys: keys[0].flatten()[:24], None),
        (lambda keys: None, "what it observes is no tensor on cpu of at most 24 numbers"),
        (lambda keys: keys[0].flatten()[:25], "what it observes is no tensor on cpu of at most 24 numbers"),
        (lambda keys: keys.to("meta"), "what it observes is no tensor on cpu"),
        (raising, "what it observes raises KeyError: 'two\\nlines'"),
    ],
)
def test_what_is_no_observation_is_named_in_one_line(observed: Any, problem: str | None) -> None:
    found = score_problem(SomeObserver(observed), **SHAPES[0], device="cpu")
    assert found is None if problem is None else found is not None and found.startswith(problem) and "\n" not in found


@pytest.mark.parametrize("name", POLICIES)
def test_who_observes_all_heads_serves_on_one_rank_alone(name: str) -> None:
    policy = make_policy(PolicyConfig(policy=name))
    refuse_split_observations(policy, name, 1)
    if name != "thinkv":
        refuse_split_observations(policy, name, 2)
        return
    with pytest.raises(RefusedError, match=r"^--kv-policy thinkv cannot be used with 2 tensor-parallel ranks: .*; set"):
        refuse_split_observations(policy, name, 2)
