"""The oracle's score against the definition written as loops over numbers."""

import math

import pytest
import torch

from tests.support.oracle.loop_scores import loop_rkv_scores
from tests.support.oracle.scores import ScoreInputs, rkv_scores


@pytest.mark.parametrize("seed", torch.randint(2**31, (8,), generator=torch.Generator().manual_seed(0)).tolist())
@pytest.mark.parametrize("head_dim", [2, 3, 8, 48], ids="head_dim={}".format)
def test_matches_loops(head_dim: int, seed: int) -> None:
    # In two dimensions most keys have near-duplicates; in 48 hardly any has one.
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    num_kv_heads, group_size, window, resident_len = draw(1, 4), draw(1, 4), draw(1, 6), draw(9, 40)
    prompt_len = draw(0, resident_len - window)
    keys = torch.randn(num_kv_heads, resident_len, head_dim, generator=generator)
    keys[:, draw(0, resident_len)] = 0.0
    queries = torch.randn(num_kv_heads * group_size, window, head_dim, generator=generator)
    positions = torch.arange(resident_len).expand(num_kv_heads, -1)
    mix_lambda, threshold = torch.rand(2, generator=generator).tolist()
    kernel_size = 2 * draw(0, 5) + 1
    scores = rkv_scores(
        ScoreInputs(keys, keys, queries, positions, prompt_len),
        mix_lambda=mix_lambda,
        kernel_size=kernel_size,
        similarity_threshold=threshold,
    )
    assert scores.shape == (num_kv_heads, resident_len - window)
    for head in range(num_kv_heads):
        expected = loop_rkv_scores(
            keys[head],
            queries[head * group_size : (head + 1) * group_size],
            mix_lambda=mix_lambda,
            kernel_size=kernel_size,
            similarity_threshold=threshold,
        )
        torch.testing.assert_close(scores[head].double(), expected.scores, atol=1e-6, rtol=1e-5)


def test_most_recent_near_duplicate_is_exempt() -> None:
    # Three equal keys and one orthogonal, window of one. Row sums of similarity to others, each row's most recent
    # duplicate removed: rows 0 and 1 exempt column 2, row 2 exempts column 1.
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    queries = torch.tensor([[[0.0, 1.0]]])
    scores = rkv_scores(
        ScoreInputs(keys, keys, queries, torch.arange(4)[None], 0),
        mix_lambda=0.0,
        kernel_size=1,
        similarity_threshold=0.5,
    )
    column_means = [2 / 4, 1 / 4, 0.0, 0.0]
    total = sum(math.exp(mean) for mean in column_means)
    torch.testing.assert_close(scores[0], torch.tensor([-math.exp(mean) / total for mean in column_means[:3]]))
