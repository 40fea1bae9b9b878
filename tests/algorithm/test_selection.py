"""Properties of the kept indices, for any scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rkv_sglang.algorithm import reference, selection
from tests.algorithm.cases import DEVICES


@st.composite
def selections(draw):
    """Scores with many ties, and a prompt, window and budget that fit them."""
    num_kv_heads = draw(st.integers(1, 4))
    prompt_len = draw(st.integers(0, 9))
    window = draw(st.integers(1, 9))
    num_candidates = draw(st.integers(0, 60))
    budget = window + draw(st.integers(0, num_candidates))
    value = draw(
        st.sampled_from(
            [
                st.floats(width=32, allow_nan=False),
                st.integers(-2, 2).map(float),
                st.sampled_from([0.0, -0.0, float("inf"), float("-inf")]),
            ]
        )
    )
    row = st.lists(value, min_size=prompt_len + num_candidates, max_size=prompt_len + num_candidates)
    rows = draw(st.lists(row, min_size=num_kv_heads, max_size=num_kv_heads))
    scores = torch.tensor(rows, dtype=torch.float32).reshape(num_kv_heads, prompt_len + num_candidates)
    return scores, prompt_len, window, budget


@pytest.mark.parametrize("device", DEVICES)
@given(selections())
@settings(deadline=None, max_examples=300)
def test_kept_indices_are_sorted_unique_complete_and_the_best(device, case):
    scores, prompt_len, window, budget = case
    num_kv_heads, num_scored = scores.shape
    num_candidates = num_scored - prompt_len
    before = scores.clone()
    kept = selection.select_kept(scores.to(device), prompt_len, window, budget).cpu()

    assert torch.equal(scores, before)
    assert kept.dtype == torch.int64
    assert kept.shape == (num_kv_heads, budget)
    assert (kept >= torch.arange(budget)).all(), "a kept token may only move towards the front"
    assert (kept.diff(dim=1) > 0).all(), "sorted and unique"
    assert (kept[:, budget - window :] == torch.arange(num_candidates, num_candidates + window)).all()
    for head in range(num_kv_heads):
        best = kept[head, : budget - window].tolist()
        candidates = scores[head, prompt_len:].tolist()
        assert all(0 <= index < num_candidates for index in best)
        dropped = set(range(num_candidates)) - set(best)
        # Every kept one beats every dropped one, by score or by being earlier.
        assert all(
            candidates[i] > candidates[j] or (candidates[i] == candidates[j] and i < j) for i in best for j in dropped
        )
    assert kept.tolist() == reference.select_kept(scores, prompt_len, window, budget).tolist()


@given(selections())
@settings(deadline=None, max_examples=100)
def test_a_head_is_chosen_by_its_own_scores_and_a_larger_budget_only_adds(case):
    scores, prompt_len, window, budget = case
    kept = selection.select_kept(scores, prompt_len, window, budget)
    for head in range(len(scores)):
        alone = selection.select_kept(scores[head : head + 1], prompt_len, window, budget)
        assert torch.equal(kept[head : head + 1], alone)
    if budget > window:
        smaller = selection.select_kept(scores, prompt_len, window, budget - 1)
        assert all(set(few) < set(many) for few, many in zip(smaller.tolist(), kept.tolist(), strict=True))


def test_nan_scores_still_give_valid_indices():
    scores = torch.tensor([[0.5, float("nan"), 0.1, float("nan"), float("inf")], [float("nan")] * 5])
    kept = selection.select_kept(scores, 0, 2, 5)
    assert kept.tolist() == [[1, 3, 4, 5, 6], [0, 1, 2, 5, 6]]


@pytest.mark.parametrize("module", [reference, selection], ids=["reference", "selection"])
def test_what_cannot_be_kept_is_refused_by_name(module):
    scores = torch.zeros(2, 10)
    with pytest.raises(ValueError, match=r"scores \[2, 10\] hold 6 candidates after prompt_len 4.*asks for 7"):
        module.select_kept(scores, 4, 8, 15)
    with pytest.raises(ValueError, match=r"scores \[2, 10\] hold -1 candidates after prompt_len 11"):
        module.select_kept(scores, 11, 8, 8)
    with pytest.raises(ValueError, match=r"scores must be \[num_kv_heads, L - window\], got \[10\]"):
        module.select_kept(scores[0], 4, 2, 4)
    with pytest.raises(ValueError, match=r"scores must be \[num_kv_heads, L - window\], got \[0, 10\]"):
        module.select_kept(scores[:0], 4, 2, 4)
    with pytest.raises(ValueError, match=r"floating dtype, got torch.int64"):
        module.select_kept(scores.long(), 4, 2, 4)
    for prompt_len, window, budget in ((-1, 2, 4), (0, 0, 4), (0, 5, 4)):
        with pytest.raises(ValueError, match=f"got prompt_len {prompt_len}, window {window}, budget {budget}"):
            module.select_kept(scores, prompt_len, window, budget)
