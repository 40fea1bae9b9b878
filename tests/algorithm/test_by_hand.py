"""Each step of the R-KV score worked by hand; the literal and the vectorised version must both give it."""

import math

import pytest
import torch

from rkv_sglang.algorithm import reference, scoring, selection


@pytest.fixture(params=[reference, scoring], ids=["reference", "scoring"])
def scores(request):
    return request.param


@pytest.fixture(params=[reference, selection], ids=["reference", "selection"])
def select_kept(request):
    return request.param.select_kept


def one_head(*values):
    """One KV head: ``[L, 1, head_dim]`` from L vectors or L numbers."""
    return torch.tensor(values, dtype=torch.float32).reshape(len(values), 1, -1)


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def assert_rows(actual, *rows):
    torch.testing.assert_close(actual, torch.tensor(rows, dtype=torch.float32), rtol=1e-6, atol=1e-7)


def test_the_group_takes_its_max_on_raw_logits(scores):
    keys = one_head(math.log(2), 0.0, -math.log(4), 9.0)
    queries = torch.tensor([[[1.0], [-1.0]]])
    # The larger of k and -k is |k|: weights 2, 1, 4. A max after the softmax would not even sum to 1.
    assert_rows(scores.importance(queries, keys, 1), [2 / 7, 1 / 7, 4 / 7])


def test_logits_are_divided_by_the_root_of_head_dim(scores):
    keys = one_head([math.log(9), 0.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4)
    queries = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    assert_rows(scores.importance(queries, keys, 1), [3 / 4, 1 / 4])


def test_the_window_is_averaged_after_the_softmax(scores):
    keys = one_head(math.log(2), 0.0, 0.0, 5.0, 7.0)
    queries = torch.tensor([[[1.0]], [[-1.0]]])
    # Softmax rows 1/2, 1/4, 1/4 and 1/5, 2/5, 2/5; averaged logits would give thirds.
    assert_rows(scores.importance(queries, keys, 1), [0.35, 0.325, 0.325])


def test_the_pool_takes_the_max_over_temporal_neighbours(scores):
    weights = [1.0, 2.0, 3.0, 10.0, 1.0, 1.0, 2.0]
    keys = one_head(*[math.log(weight) for weight in weights], 0.0)
    queries = torch.tensor([[[1.0]]])
    assert_rows(scores.importance(queries, keys, 3), [w / 20 for w in [2.0, 3.0, 10.0, 10.0, 10.0, 2.0, 2.0]])
    assert_rows(scores.importance(queries, keys, 5), [w / 20 for w in [3.0, 10.0, 10.0, 10.0, 10.0, 10.0, 2.0]])


def test_a_pool_wider_than_the_candidates_gives_their_max(scores):
    keys = one_head(math.log(3), 0.0, 1.0)
    assert_rows(scores.importance(torch.tensor([[[1.0]]]), keys, 7), [3 / 4, 3 / 4])


def test_neighbouring_query_heads_share_a_kv_head(scores):
    keys = torch.tensor([math.log(2), 0.0, 0.0]).reshape(3, 1, 1).repeat(1, 2, 1)
    queries = torch.tensor([[[1.0], [1.0], [0.0], [0.0]]])
    assert_rows(scores.importance(queries, keys, 1), [2 / 3, 1 / 3], [1 / 2, 1 / 2])


# Cosines 0.6 (tokens 0, 1), 0 (0, 2) and 0.8 (1, 2), at lengths that must not matter.
CORNER = one_head([2.0, 0.0], [0.3, 0.4], [0.0, 7.0])


def test_each_row_exempts_its_most_recent_near_duplicate(scores):
    # Row 0 exempts column 1, row 1 column 2 (and not 0), row 2 column 1. Only S_10 = 0.6 is left.
    assert_rows(scores.redundancy(CORNER, 0.5), softmax([0.6 / 3, 0.0, 0.0]))


def test_a_row_without_near_duplicate_exempts_column_0(scores):
    # Column 0 loses S_10 and S_20; column 1 keeps 0.6 + 0.8, column 2 keeps 0 + 0.8.
    assert_rows(scores.redundancy(CORNER, 0.9), softmax([0.0, 1.4 / 3, 0.8 / 3]))


def test_near_duplicate_means_above_the_threshold_and_not_at_it(scores):
    keys = one_head([1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    # At the threshold 0 the zeros towards token 3 are no hits: row 0 exempts column 2 and row 2 column 0, both 1;
    # row 1 has no hit and exempts S_10 = -1, row 3 S_30 = 0.
    assert_rows(scores.redundancy(keys, 0.0), softmax([0.0, -2 / 4, -1 / 4, 0.0]))


def test_below_a_threshold_of_0_a_row_may_hit_its_own_diagonal(scores):
    # Row 0 exempts S_02 = 0, row 1 S_12 = 0.8, and row 2 its own 0: S_21 = 0.8 stays.
    assert_rows(scores.redundancy(CORNER, -0.5), softmax([0.6 / 3, 1.4 / 3, 0.0]))


def test_zero_keys_are_equally_redundant(scores):
    assert_rows(scores.redundancy(torch.zeros(5, 1, 4), 0.5), [0.2] * 5)


def test_equal_keys_exempt_the_newest_column_and_the_newest_row_the_one_before(scores):
    keys = one_head(*[[3.0, 4.0]] * 5)
    assert_rows(scores.redundancy(keys, 0.5), softmax([4 / 5, 4 / 5, 4 / 5, 3 / 5, 0.0]))


def test_one_token_is_all_of_the_softmax(scores):
    assert_rows(scores.redundancy(one_head([1.0, 2.0]), 0.5), [1.0])
    assert_rows(scores.redundancy(one_head([1.0, 2.0]), -0.5), [1.0])


def test_the_score_mixes_importance_and_redundancy_over_all_tokens(scores):
    queries = torch.tensor([[[1.0, 0.0]]])
    important = softmax([2.0 / math.sqrt(2), 0.3 / math.sqrt(2)])
    redundant = softmax([0.6 / 3, 0.0, 0.0])
    result = scores.rkv_scores(queries, CORNER, mix_lambda=0.25, kernel_size=1, similarity_threshold=0.5)
    assert_rows(result, [0.25 * important[j] - 0.75 * redundant[j] for j in range(2)])


def test_a_window_of_all_tokens_leaves_nothing_to_score(scores):
    queries = torch.ones(3, 1, 2)
    assert scores.importance(queries, CORNER, 7).shape == (1, 0)
    result = scores.rkv_scores(queries, CORNER, mix_lambda=0.1, kernel_size=7, similarity_threshold=0.5)
    assert result.shape == (1, 0)
    assert result.dtype == torch.float32


def test_every_head_keeps_its_own_best_and_the_window(select_kept):
    # Prompt of 2 with the best scores of all, candidates 0 to 4, window 5 and 6.
    scores = torch.tensor([[9.0, 9.0, 0.1, 0.5, 0.2, 0.4, 0.3], [9.0, 9.0, 0.5, -1.0, -2.0, -3.0, 0.6]])
    kept = select_kept(scores, 2, 2, 4)
    assert kept.tolist() == [[1, 3, 5, 6], [0, 4, 5, 6]]
    assert kept.dtype == torch.int64


def test_of_equal_scores_the_earlier_token_is_kept(select_kept):
    scores = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, -0.0]])
    assert select_kept(scores, 0, 1, 3).tolist() == [[0, 2, 6]]
    assert select_kept(scores, 0, 1, 5).tolist() == [[0, 1, 2, 3, 6]]


def test_a_budget_of_all_keeps_all_and_a_budget_of_the_window_the_window(select_kept):
    scores = torch.tensor([[7.0, 3.0, 1.0, 2.0]])
    assert select_kept(scores, 1, 2, 5).tolist() == [[0, 1, 2, 3, 4]]
    assert select_kept(scores, 1, 2, 2).tolist() == [[3, 4]]
    assert select_kept(torch.empty(2, 0), 0, 3, 3).tolist() == [[0, 1, 2], [0, 1, 2]]
