"""Modes of a sample of shares, and where it is thinnest between them."""

from itertools import pairwise

import torch
from torch import Tensor

NUM_POINTS = 512
# A mode that rises from what lies between it and a higher one by less than this part of the highest is none.
LEAST_RISE = 0.05


def between_three_modes(samples: Tensor) -> tuple[float, float] | None:
    """Return where a sample is thinnest between its modes, if it has three.

    Its density is a sum of normal ones, as wide as Silverman's rule says: ``0.9 min(deviation, quartiles apart / 1.34)
    n^(-1/5)``, and at least a step of the grid.

    Args:
        samples: Numbers in [0, 1], ``[num_samples]``, floating; at least one.
    """
    shares = samples.double().cpu()
    # Steps on a grid: what differs by rounding alone counts the same.
    steps = (shares * NUM_POINTS).round().long().clamp(0, NUM_POINTS)
    counts = torch.bincount(steps, minlength=NUM_POINTS + 1).double()
    grid = torch.arange(NUM_POINTS + 1, dtype=torch.float64) / NUM_POINTS
    ordered = grid[steps].sort().values
    quartiles = ordered[3 * (len(ordered) - 1) // 4] - ordered[(len(ordered) - 1) // 4]
    deviation = ordered.std(correction=0)
    spread = float(torch.minimum(deviation, quartiles / 1.34)) or float(deviation)
    width = max(0.9 * spread * len(ordered) ** -0.2, 1 / NUM_POINTS)
    # A mode may lie at either end, so there is more of the grid behind them.
    around = torch.arange(-NUM_POINTS // 4, NUM_POINTS + NUM_POINTS // 4 + 1, dtype=torch.float64) / NUM_POINTS
    density = torch.exp(-0.5 * ((around[:, None] - grid) / width).square()) @ counts
    modes = _modes(density)
    if len(modes) != 3:
        return None
    low, high = (_valley(density, *pair) for pair in pairwise(modes))
    return float(around[low]), float(around[high])


def _modes(density: Tensor) -> list[int]:
    """Return the places of modes, ascending: the least of two goes as long as there is next to nothing between them."""
    inner = density[1:-1]
    is_mode = (inner > density[:-2]) & (inner >= density[2:]) & (inner >= LEAST_RISE * density.max())
    modes = [int(place) + 1 for place in is_mode.nonzero()[:, 0]]
    while len(modes) > 1:
        pairs = list(pairwise(modes))
        rises = [float(density[list(pair)].min() - density[_valley(density, *pair)]) for pair in pairs]
        least = rises.index(min(rises))
        if rises[least] >= LEAST_RISE * float(density.max()):
            break
        modes.remove(min(pairs[least], key=lambda place: float(density[place])))
    return modes


def _valley(density: Tensor, low: int, high: int) -> int:
    return int(density[low : high + 1].argmin()) + low
