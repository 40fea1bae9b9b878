"""A choice between two scores that lie as close as rounding is forgiven, and nothing else."""

import random
from typing import Any

import pytest
import torch

from devtools.tiny_models import tiny_model_path
from tests.support.oracle.decoder import load_model
from tests.support.oracle.dense import dense_generate, dense_prefix
from tests.support.oracle.masked_compact import masked_compact
from tests.support.oracle.scores import ScoreInputs
from tests.support.oracle.ties import AT_PREFIX, CUT_TOLERANCE, num_equal, settled, swapped_at_cut

NUM_TOKENS = 60
SIZES: dict[str, Any] = {"budget": 12, "buffer": 8, "window": 4}
# Compactions come after 21, 29, 37, 45 and 53 tokens.
CUTS = [21, 29, 37, 45, 53]


def latest(gap: float) -> Any:
    """Return scores that keep the latest tokens, each so far above the one before it."""

    def scores(inputs: ScoreInputs) -> torch.Tensor:
        return inputs.positions[:, : -inputs.window_queries.shape[1]].float() * gap + 0.01

    return scores


def answer(gap: float, rng: random.Random, block: int | None, masked: bool = False, **options: Any) -> Any:
    model = load_model(tiny_model_path("llama-gqa"))
    prompt = [rng.randrange(3, 512) for _ in range(9)]
    make: Any = masked_compact if masked else dense_generate
    return make(model, prompt, NUM_TOKENS, **SIZES, score=latest(gap), block=block, **options)


# A layer and head of its own, or blocks; the gap of blocks is as many times as wide as they have tokens.
@pytest.mark.parametrize("gap, block, masked", [(4e-7, None, False), (2e-7, 2, False), (4e-7, None, True)])
def test_the_other_choice_at_near_ties_is_settled_and_a_wrong_token_is_not(gap, block, masked, rng):
    right = answer(gap, rng, block, masked)
    assert [at for at, _ in right.cuts] == CUTS
    for at, margin in right.cuts:
        assert 0 < margin < CUT_TOLERANCE, at
    other = right.again(swapped_at={29, 45})
    assert other.output_ids != right.output_ids
    assert num_equal(other.output_ids, right.output_ids) >= 29
    assert settled(other.output_ids, right).output_ids == other.output_ids
    # Neither the right answer nor one of another choice.
    for at in (20, 50):
        wrong = list(other.output_ids)
        wrong[at] = wrong[at] % 500 + 4
        assert num_equal(wrong, settled(wrong, right).output_ids) <= at


@pytest.mark.parametrize("gap", [0.0, 3e-6])
def test_scores_that_are_equal_or_further_apart_are_no_near_tie(gap, rng):
    right = answer(gap, rng, None)
    assert right.again(swapped_at=set(CUTS)).output_ids == right.output_ids
    wrong = [*right.output_ids[:30], *answer(gap, rng, None).output_ids[30:]]
    assert settled(wrong, right) is right


def test_only_the_two_at_the_cut_change_places() -> None:
    scores = torch.tensor([[5.0, 4.0, 4.0 - 9.6e-7, 4.0 - 1.9e-6], [5.0, 4.0, 4.0, 3.0], [5.0, 4.0, 3.0, 2.0]])
    ranked = torch.tensor([[7, 3, 9, 1]]).repeat(3, 1)
    assert swapped_at_cut(scores, ranked, 2)[1].tolist() == [[7, 9, 3, 1], [7, 3, 9, 1], [7, 3, 9, 1]]
    assert swapped_at_cut(scores, ranked, 1)[1].tolist() == ranked.tolist()


def test_the_other_choice_of_a_prefix_is_settled(rng):
    model = tiny_model_path("llama-gqa")
    document, task, prompt = ([rng.randrange(3, 512) for _ in range(n)] for n in (40, 9, 7))
    prefix = dense_prefix(model, document, task, 20, window=4, score=latest(4e-7))
    right = dense_generate(model, prompt, 30, budget=100, buffer=8, prefix=prefix)
    assert [at for at, _ in right.cuts] == [AT_PREFIX]
    other = dense_generate(model, prompt, 30, budget=100, buffer=8, prefix=prefix.again(is_swapped=True))
    assert other.output_ids != right.output_ids
    assert settled(other.output_ids, right).output_ids == other.output_ids


def test_what_is_close_among_small_scores_is_closer() -> None:
    scores = torch.tensor([[2e-6, 1e-6, 1e-6 - 9e-10], [2e-6, 1e-6, 9e-7]])
    ranked = torch.tensor([[7, 3, 9]]).repeat(2, 1)
    assert swapped_at_cut(scores, ranked, 2)[1].tolist() == [[7, 9, 3], [7, 3, 9]]
