"""Which elements of a model's weights tell whose statistics a file holds."""

import itertools

import pytest
import torch

from rkv_sglang.integration.startup.calibration import SAMPLED_ELEMENTS, sampled_places

CPU = torch.device("cpu")
# Embeddings of 151,936 words and 896 numbers: in fp32 their last element has the number of the one behind it.
ROUNDED_UP = 151936 * 896


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 2**24 + 3, ROUNDED_UP, 2**31 + 1, 2**40 - 1])
def test_the_sampled_elements_are_spread_from_the_first_to_the_last(length):
    places = sampled_places(length, CPU).tolist()
    assert len(places) == min(length, SAMPLED_ELEMENTS) == len(set(places))
    assert places[0] == 0 and places[-1] == length - 1
    steps = {after - before for before, after in itertools.pairwise(places)}
    assert not steps or max(steps) - min(steps) <= 1


def test_no_element_is_sampled_of_none():
    assert sampled_places(0, CPU).tolist() == []
