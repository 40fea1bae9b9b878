"""The choice of kept tokens on ragged batches: exactly that of the torch version, ties and odd numbers included."""

import random

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from rkv_sglang.algorithm.selection import select_kept
from rkv_sglang.cache import prompt
from rkv_sglang.kernels.paged_batch import PagedBatch
from rkv_sglang.kernels.select import select_kept_paged
from rkv_sglang.sizes.prompt_plan import PromptPlan
from tests.kernels.paged import columns_of, make_batch

SMALLEST, LARGEST = 1e-45, torch.finfo(torch.float32).max
ODD_NUMBERS = [0.0, -0.0, SMALLEST, -SMALLEST, LARGEST, -LARGEST, torch.inf, -torch.inf, torch.nan, -torch.nan]


def numbers(rng: random.Random, kind: str, count: int) -> list[float]:
    if kind == "all equal":
        return [rng.uniform(-1, 1)] * count
    if kind == "few values":
        return [float(rng.randint(-2, 2)) for _ in range(count)]
    if kind == "odd":
        return [rng.choice(ODD_NUMBERS) for _ in range(count)]
    if kind == "neighbours":
        # Numbers that differ in the last bits only, of both signs.
        near = torch.tensor([rng.choice([-0.1, 0.1]) for _ in range(count)]).view(torch.int32)
        return (near + torch.tensor([rng.randint(-3, 3) for _ in range(count)]).int()).view(torch.float32).tolist()
    if kind == "not a number":
        return [torch.nan] * count
    return [rng.gauss(0.0, 1.0) * 10 ** rng.randint(-30, 30) for _ in range(count)]


def ragged_batch(rng: random.Random, window: int) -> PagedBatch:
    """Requests that keep some, all, and no candidates besides the window, and one without candidates."""
    num_candidates = [rng.randint(2, 70), rng.randint(1, 40), rng.randint(1, 40), 0]
    num_best = [rng.randint(1, num_candidates[0] - 1), num_candidates[1], 0, 0]
    prompt_lens = [rng.randint(0, 20) for _ in num_candidates]
    order = rng.sample(range(4), 4)
    return make_batch(
        rng,
        1,
        kv_lens=[prompt_lens[i] + num_candidates[i] + window for i in order],
        prompt_lens=[prompt_lens[i] for i in order],
        budgets=[num_best[i] + window for i in order],
        window=window,
    )


def check_exact(batch: PagedBatch, scores: Tensor, kept_indices: Tensor) -> None:
    """Every head keeps what the torch version keeps, then come -1."""
    num_layers, num_kv_heads, _ = scores.shape
    assert kept_indices.dtype == torch.int32
    assert kept_indices.shape == (num_layers, batch.num_requests, num_kv_heads, batch.max_budget)
    for layer in range(num_layers):
        for request, (kv_len, prompt_len, budget) in enumerate(
            zip(batch.kv_lens_cpu, batch.prompt_lens_cpu, batch.budgets_cpu, strict=True)
        ):
            scored = scores[layer, :, columns_of(batch, request)][:, : kv_len - batch.window]
            expected = select_kept(scored, prompt_len, batch.window, budget)
            assert kept_indices[layer, request, :, :budget].tolist() == expected.tolist()
            assert (kept_indices[layer, request, :, budget:] == -1).all()


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("kind", ["all equal", "few values", "odd", "neighbours", "not a number", "any"])
def test_the_choice_is_that_of_the_torch_version(rng, monkeypatch, kind, block):
    batch = ragged_batch(rng, window=rng.randint(1, 5))
    # What nobody may choose is what everybody would.
    scores = torch.full((1, 2, batch.num_tokens), torch.nan)
    for request, (kv_len, prompt_len) in enumerate(zip(batch.kv_lens_cpu, batch.prompt_lens_cpu, strict=True)):
        for head in range(2):
            count = kv_len - batch.window - prompt_len
            columns = columns_of(batch, request)
            candidates = slice(columns.start + prompt_len, columns.stop - batch.window)
            scores[0, head, candidates] = torch.tensor(numbers(rng, kind, count))
    before = scores.clone()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(2**30))
    kept_indices = select_kept_paged(scores, batch, block=block)
    assert torch.equal(scores.view(torch.int32), before.view(torch.int32))
    check_exact(batch, scores, kept_indices)


def test_layers_and_heads_choose_by_their_own_scores_in_one_launch(rng, seed, monkeypatch):
    torch.manual_seed(seed)
    batch = ragged_batch(rng, window=3)
    scores = torch.randn(2, 3, batch.num_tokens)
    launches = []
    run = JITFunction.run

    def recorded_run(kernel, *args, **kwargs):
        launches.append(kernel)
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", recorded_run)
    check_exact(batch, scores, select_kept_paged(scores, batch))
    assert len(launches) == 1


def test_of_prompts_the_kernel_chooses_what_torch_chooses(rng, seed):
    torch.manual_seed(seed)
    window = rng.randint(1, 5)
    plans = [PromptPlan(budget + rng.randint(1, 40), 0, budget) for budget in (5 + window, 9 + window, 30 + window)]
    scores = [
        torch.tensor(numbers(rng, kind, 6 * plan.prompt_len)).view(2, 3, -1)
        for kind, plan in zip(["few values", "odd", "any"], plans, strict=True)
    ]
    found, right = (choose(scores, plans, window) for choose in (prompt._best_paged, prompt._best_torch))
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


def test_what_does_not_fit_is_refused_by_name(rng):
    batch = ragged_batch(rng, window=2)
    scores = torch.zeros(1, 2, batch.num_tokens)
    for wrong, message in (
        (scores[0], r"scores must be \[num_layers, num_kv_heads"),
        (scores[:, :, 1:], r"the tokens of batch"),
        (scores[:, :0], r"the tokens of batch"),
        (scores.half(), "contiguous fp32, got torch.float16"),
        (scores.transpose(0, 1).contiguous().transpose(0, 1).expand(3, -1, -1), "contiguous fp32"),
        (scores.to("meta"), "scores are on meta and batch on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            select_kept_paged(wrong, batch)
