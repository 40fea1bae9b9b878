"""Blocks that leave a map: exactly the lowest go, the rest of the map stays, and what is freed is what went."""

import random

import pytest
import torch

from rkv_sglang.cache.block_choice import BlockChoice, choose_by_place, kept_tokens
from rkv_sglang.cache.drop import drop_blocks
from rkv_sglang.policies import Policy, Random, RandomAttention, StreamingLLM
from rkv_sglang.sizes.compaction_plan import DropPlan, block_of_pages, plan_drop
from tests.support.oracle.policy_scores import score_function
from tests.support.oracle.scores import ScoreInputs

ROUNDS = range(8)
PAGE_SIZES = (1, 2, 8, 16, 24, 64)


def random_plan(rng: random.Random, block: int, *, window: int) -> DropPlan:
    budget = window + block - 1 + rng.randrange(3 * block)
    above = rng.randrange(block, 4 * block)
    prompt_len = rng.choice([0, 1, block - 1, block, rng.randrange(100)])
    return plan_drop(
        prompt_len=prompt_len, resident_len=prompt_len + budget + above, budget=budget, window=window, block=block
    )


def random_choice(rng: random.Random, plan: DropPlan) -> BlockChoice:
    blocks = range(plan.first_block, plan.end_block)
    dropped = sorted(rng.sample(blocks, plan.num_dropped))
    kept = [number for number in blocks if number not in dropped]
    return BlockChoice(torch.tensor(kept, dtype=torch.int64), torch.tensor(dropped, dtype=torch.int64))


def paged_map(rng: random.Random, num_rows: int, width: int, page_size: int) -> torch.Tensor:
    """Return rows of whole pages, no page twice, none of them the first."""
    pages_a_row = -(-width // page_size)
    pages = torch.tensor(rng.sample(range(1, 2 * num_rows * pages_a_row), num_rows * pages_a_row))
    slots = pages.view(num_rows, -1, 1) * page_size + torch.arange(page_size)
    return slots.flatten(1)[:, :width].to(torch.int32).contiguous()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_plan_drops_whole_blocks_and_leaves_prompt_window_and_budget(page_size, rng):
    block = block_of_pages(page_size)
    assert block >= 16 and block % page_size == 0 and (16 % page_size or block == 16)
    for _ in range(200):
        window = rng.choice([1, 8, 64])
        plan = random_plan(rng, block, window=window)
        above = plan.generated_len - plan.budget
        assert plan.evicted_tokens == plan.num_dropped * block == above and above % block == 0
        assert plan.first_block * block >= plan.prompt_len > (plan.first_block - 1) * block
        assert plan.end_block * block <= plan.resident_len - window < (plan.end_block + 1) * block
        assert plan.num_kept >= 0


def test_nothing_is_planned_where_no_block_can_go():
    sizes = {"prompt_len": 5, "budget": 32, "block": 16}
    with pytest.raises(ValueError, match="no block of 16 can be dropped"):
        plan_drop(resident_len=5 + 32 + 15, window=8, **sizes)
    with pytest.raises(ValueError, match="no block of 16 can be dropped"):
        plan_drop(resident_len=5 + 32 + 16, window=30, **sizes)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_row_is_what_it_was_without_the_dropped_blocks(page_size, rng):
    block = block_of_pages(page_size)
    for _ in ROUNDS:
        plans = [random_plan(rng, block, window=5) for _ in range(rng.randrange(1, 5))]
        choices = [random_choice(rng, plan) for plan in plans]
        req_to_token = paged_map(rng, 7, max(plan.resident_len for plan in plans) + rng.randrange(9), page_size)
        rows = rng.sample(range(7), len(plans))
        before = req_to_token.clone()
        freed = drop_blocks(req_to_token, rows, plans, choices, page_size)
        expected = before.clone()
        expected_pages = []
        for row, plan, choice in zip(rows, plans, choices, strict=True):
            gone = {b * block + i for b in choice.dropped.tolist() for i in range(block)}
            stays = [i for i in range(plan.resident_len) if i not in gone]
            assert len(stays) == plan.kept_len
            assert kept_tokens(plan, choice).tolist() == [i - plan.prompt_len for i in stays if i >= plan.prompt_len]
            expected[row, : plan.kept_len] = before[row, stays]
            expected_pages += before[row, sorted(gone)][::page_size].div(page_size, rounding_mode="floor").tolist()
        assert torch.equal(req_to_token, expected)
        assert freed.dtype == torch.int64 and freed.tolist() == expected_pages
        assert len(set(expected_pages)) == len(expected_pages)


@pytest.mark.parametrize("policy", [RandomAttention(seed=7), Random(), StreamingLLM()], ids=lambda p: type(p).__name__)
def test_the_blocks_of_the_lowest_mean_score_go_the_older_of_equal_ones_first(policy: Policy, rng):
    name = {RandomAttention: "random_attention", Random: "random", StreamingLLM: "streaming_llm"}[type(policy)]
    options = {"seed": 7, "whole_request": True} if name == "random_attention" else {}
    for _ in ROUNDS:
        window = 9
        plans = [random_plan(rng, 16, window=window) for _ in range(3)]
        evicted = [rng.randrange(500) for _ in plans]
        due = [(plan, plan.resident_len + gone, None) for plan, gone in zip(plans, evicted, strict=True)]
        choices = choose_by_place(due, policy, window)
        for plan, gone, choice in zip(plans, evicted, choices, strict=True):
            # Sinks stay, so what comes first is what came first.
            positions = torch.arange(plan.resident_len) + (0 if name == "streaming_llm" else gone)
            nothing = torch.zeros(1, plan.resident_len, 2)
            inputs = ScoreInputs(nothing, nothing, nothing[:, :window], positions[None], plan.prompt_len)
            scores = score_function(name, **options)(inputs)[0].double()
            blocks = range(plan.first_block, plan.end_block)
            ranked = sorted(blocks, key=lambda b: (scores[b * 16 : b * 16 + 16].mean().item(), b))
            assert choice.dropped.tolist() == sorted(ranked[: plan.num_dropped])
            assert choice.kept.tolist() == sorted(ranked[plan.num_dropped :])
            if name == "random":
                stays = kept_tokens(plan, choice)[: plan.budget - window] + plan.prompt_len
                assert choice.kept_state is not None
                assert torch.equal(choice.kept_state.double(), scores[stays])


def test_equal_scores_let_the_older_block_go():
    class Equal:
        """The same for every token."""

        def score_places(self, places):
            return torch.zeros(len(places.indices))

    plan = plan_drop(prompt_len=3, resident_len=3 + 64 + 32, budget=64, window=5, block=16)
    (choice,) = choose_by_place([(plan, plan.resident_len, None)], Equal(), 5)  # type: ignore[arg-type]
    assert choice.dropped.tolist() == [1, 2] and choice.kept.tolist() == [3, 4]
