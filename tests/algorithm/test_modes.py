"""Where a sample is thinnest between three modes, and that fewer or more are no three."""

import pytest
import torch

from rkv_sglang.algorithm.modes import between_three_modes
from tests.algorithm.cases import fresh_seed


def sample(*bumps: tuple[float, int], deviation: float = 0.02) -> torch.Tensor:
    torch.manual_seed(fresh_seed())
    parts = [centre + deviation * torch.randn(count) for centre, count in bumps]
    shuffled = torch.cat(parts)[torch.randperm(sum(map(len, parts)))]
    return shuffled.clamp(0, 1)


@pytest.mark.parametrize("counts", [(3000, 3000, 3000), (500, 4000, 900)], ids=str)
@pytest.mark.parametrize("centres", [(0.2, 0.5, 0.8), (0.01, 0.4, 0.99), (0.6, 0.75, 0.9)], ids=str)
def test_bounds_lie_between_three_modes(centres: tuple[float, ...], counts: tuple[int, ...]) -> None:
    bounds = between_three_modes(sample(*zip(centres, counts, strict=True)))
    assert bounds is not None
    for bound, low, high in zip(bounds, centres, centres[1:], strict=False):
        # A third of the way at the least from either mode.
        assert low + (high - low) / 4 < bound < high - (high - low) / 4


@pytest.mark.parametrize(
    "centres", [(0.5,), (0.2, 0.8), (0.1, 0.35, 0.65, 0.9)], ids=["one mode", "two modes", "four modes"]
)
def test_another_number_of_modes_has_no_bounds(centres: tuple[float, ...]) -> None:
    assert between_three_modes(sample(*((centre, 2000) for centre in centres))) is None


def test_few_strange_numbers_are_no_mode() -> None:
    assert between_three_modes(sample((0.3, 4000), (0.7, 4000), (0.99, 12))) is None


@pytest.mark.parametrize("number", [0.0, 0.3, 1.0])
def test_equal_numbers_have_one_mode(number: float) -> None:
    assert between_three_modes(torch.full((9,), number)) is None
    assert between_three_modes(torch.full((1,), number)) is None


def test_the_order_of_a_sample_does_not_matter() -> None:
    numbers = sample((0.2, 500), (0.5, 700), (0.8, 600))
    assert between_three_modes(numbers) == between_three_modes(numbers.flip(0)) is not None
