"""What a prompt finds within itself is found once: the same scores, and no pair of prompt tokens is compared again."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rkv_sglang.algorithm import reference, scoring
from rkv_sglang.algorithm.near_duplicates import PromptHits, exempt_sums
from tests.algorithm.cases import KEY_MAKERS, THRESHOLD, fresh_seed, make_keys
from tests.algorithm.test_scoring import assert_near


class ComparedPairs(TorchDispatchMode):
    """Counts the similarities of a row and a column that are computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.count += result.numel()
        return result


@pytest.mark.parametrize("threshold", [-0.3, 0.01, THRESHOLD, 2.0])
@pytest.mark.parametrize("kind", KEY_MAKERS)
def test_redundancy_is_the_literal_one_at_every_compaction_of_a_prompt(kind, threshold):
    seed = fresh_seed()
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for prompt_len in (1, rng.randint(2, 40), rng.randint(41, 150)):
        # Drawn together, so that any two of them are clear of the threshold.
        keys = make_keys(kind, (prompt_len + 120, 2, 24), threshold=threshold)
        hits = PromptHits.empty(1, 2, prompt_len, keys.device)
        for number in range(3):
            generated = sorted(rng.sample(range(prompt_len, prompt_len + 120), rng.randint(1, 90)))
            resident = keys[[*range(prompt_len), *generated]]
            arbiter = reference.redundancy(resident, threshold, dtype=torch.float64)
            assert_near(scoring.redundancy(resident, threshold, hits), arbiter)
            if number == 0:
                hits.is_filled, found = True, hits.columns.clone()
            # Nothing is written once they are filled.
            assert torch.equal(hits.columns, found)


def test_a_long_prompt_without_near_duplicates_is_compared_with_generated_tokens_only():
    torch.manual_seed(fresh_seed())
    prompt_len, generated_len = 8192, 1024 + 128
    unit = torch.nn.functional.normalize(torch.randn(prompt_len + generated_len, 16), dim=1)
    # No pair is above 1, so every row exempts column 0: what the first compaction would have found.
    hits = torch.zeros(prompt_len, dtype=torch.int32)
    with ComparedPairs() as pairs:
        sums = exempt_sums(unit, 1.01, hits, is_filled=True)
    assert pairs.count <= (prompt_len + generated_len) * generated_len
    torch.testing.assert_close(sums[0], (unit[1:] @ unit[0]).sum(), rtol=1e-4, atol=1e-3)
    assert not sums[1:].any()


@pytest.mark.parametrize("num_clusters", [1, 8, 200, 3000])
def test_whatever_the_keys_no_more_pairs_are_compared_than_generated_tokens_have(num_clusters):
    torch.manual_seed(fresh_seed())
    prompt_len, generated_len = 1500, 230
    num_tokens = prompt_len + generated_len
    unit = torch.nn.functional.normalize(torch.randn(num_clusters, 64), dim=1)[
        torch.randint(num_clusters, (num_tokens,))
    ]
    hits = torch.empty(prompt_len, dtype=torch.int32)
    with ComparedPairs() as pairs:
        expected = exempt_sums(unit, 0.95, hits, is_filled=False)
    assert pairs.count <= num_tokens**2
    with ComparedPairs() as pairs:
        assert torch.equal(exempt_sums(unit, 0.95, hits, is_filled=True), expected)
    # Each ordered pair with a generated token at most once.
    assert pairs.count <= generated_len * (num_tokens + prompt_len)


def test_hits_of_another_shape_are_refused():
    keys = torch.randn(9, 2, 4)
    for columns in (
        torch.zeros(1, 2, 3),
        torch.zeros(2, 2, 3, dtype=torch.int32),
        torch.zeros(1, 1, 3, dtype=torch.int32),
        torch.zeros(1, 2, 10, dtype=torch.int32),
    ):
        with pytest.raises(ValueError, match=r"prompt_hits must be int32 \[1, 2, at most 9\], got"):
            scoring.redundancy(keys, 0.5, PromptHits(columns))
