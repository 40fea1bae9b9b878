"""Inputs for the score tests: random ones and those that a fast version is likely to get wrong."""

import os
import random
from collections.abc import Callable

import torch
from torch import Tensor

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
THRESHOLD = 0.5
# Pairs nearer to the threshold than fp32 rounds a dot product of unit vectors may fall on either side of it.
CLEAR_OF_THRESHOLD = 2e-6


def fresh_seed() -> int:
    """A new seed each run, printed so that a failure shows it; set RKV_TEST_SEED to repeat one."""
    seed = int(os.environ.get("RKV_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"RKV_TEST_SEED={seed}")
    return seed


def _random(shape: tuple[int, int, int]) -> Tensor:
    return torch.randn(shape)


def _clustered(shape: tuple[int, int, int]) -> Tensor:
    """A common direction, as in trained models: most pairs are near-duplicates, a few tokens have none."""
    keys = torch.randn(shape[1:]) * 2 + torch.randn(shape)
    keys[::17] = torch.randn_like(keys[::17])
    return keys


def _equal(shape: tuple[int, int, int]) -> Tensor:
    return torch.randn(shape[1:]).expand(shape).clone()


def _zero(shape: tuple[int, int, int]) -> Tensor:
    return torch.zeros(shape)


def _some_zero(shape: tuple[int, int, int]) -> Tensor:
    keys = _clustered(shape)
    keys[::3] = 0.0
    keys[-1] = 0.0
    return keys


def _tiny(shape: tuple[int, int, int]) -> Tensor:
    """Norms near the 1e-8 that is added to them, so that unit keys are visibly shorter than 1."""
    return _clustered(shape) * 1e-8


def _duplicated(shape: tuple[int, int, int]) -> Tensor:
    """Every key occurs about twice, far apart and in no order."""
    num_tokens = shape[0]
    return torch.randn(shape)[torch.randint(0, max(1, num_tokens // 2), (num_tokens,))]


def _orthogonal(shape: tuple[int, int, int]) -> Tensor:
    """No pair above the threshold: axis vectors and their opposites, and zeros when the axes run out."""
    num_tokens, _, head_dim = shape
    axes = torch.cat([torch.eye(head_dim), -torch.eye(head_dim), torch.zeros(num_tokens, head_dim)])[:num_tokens]
    return axes[torch.randperm(num_tokens)].unsqueeze(1).repeat(1, shape[1], 1) * 3.0


def _opposite(shape: tuple[int, int, int]) -> Tensor:
    """Alternating signs: the newest near-duplicate of a token is never its neighbour."""
    signs = torch.tensor([1.0, -1.0]).repeat(shape[0])[: shape[0]]
    return torch.randn(shape[1:]) * signs[:, None, None] + 0.1 * torch.randn(shape)


def _only_oldest(shape: tuple[int, int, int]) -> Tensor:
    """The only near-duplicate of every token is the oldest one: no early exit, and the exempt column is 0."""
    num_tokens, num_kv_heads, head_dim = shape
    keys = torch.zeros(shape)
    keys[:, :, 0] = 0.6
    for token in range(1, num_tokens):
        sign = 1.0 if (token // (head_dim - 1)) % 2 == 0 else -1.0
        keys[token, :, 1 + token % (head_dim - 1)] = 0.8 * sign
    return keys.expand(num_tokens, num_kv_heads, head_dim).clone()


KEY_MAKERS: dict[str, Callable[[tuple[int, int, int]], Tensor]] = {
    "random": _random,
    "clustered": _clustered,
    "equal": _equal,
    "zero": _zero,
    "some_zero": _some_zero,
    "tiny": _tiny,
    "duplicated": _duplicated,
    "orthogonal": _orthogonal,
    "opposite": _opposite,
    "only_oldest": _only_oldest,
}


def make_keys(
    kind: str,
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    threshold: float = THRESHOLD,
    device: str = "cpu",
) -> Tensor:
    """Keys ``[L, num_kv_heads, head_dim]`` drawn again until no pair is so near the threshold that rounding decides."""
    for _ in range(100):
        keys = KEY_MAKERS[kind](shape).to(dtype)
        unit = keys.double().transpose(0, 1)
        unit = unit / (unit.norm(dim=-1, keepdim=True) + 1e-8)
        similarity = unit @ unit.transpose(1, 2)
        # The diagonal is an exact 0 for everybody.
        similarity.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        if not ((similarity - threshold).abs() < CLEAR_OF_THRESHOLD).any():
            return keys.to(device)
    raise AssertionError(f"no {kind} keys of shape {shape} stay clear of the threshold {threshold}")


def make_queries(keys: Tensor, window: int, gqa_group_size: int) -> Tensor:
    """Queries ``[window, num_kv_heads * gqa_group_size, head_dim]`` of the dtype and device of ``keys``."""
    _, num_kv_heads, head_dim = keys.shape
    return torch.randn(window, num_kv_heads * gqa_group_size, head_dim).to(keys.dtype).to(keys.device)
