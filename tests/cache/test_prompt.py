"""A prompt's compaction: what stays of it, where that and all behind it goes, and that nothing else is written."""

import random
from dataclasses import replace

import pytest
import torch

from rkv_sglang.cache import compact
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest
from rkv_sglang.cache.prompt import choose_from_prompts, compact_prompts, copy_slots
from rkv_sglang.cache.verify.prompt import compact_prompts_and_verify, copy_slots_and_verify
from rkv_sglang.cache.verify.recomputed import CompactionDiffersError
from rkv_sglang.config import PolicyConfig
from rkv_sglang.policies import POLICIES, Policy, as_scored, granularities_of, make_policy
from rkv_sglang.sizes.prompt_plan import PromptPlan
from tests.policies.cases import model_with_statistics

NUM_LAYERS, NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM, WINDOW = 3, 300, 2, 8, 3
PER_HEAD = [name for name, policy in POLICIES.items() if "head" in granularities_of(policy)]
FIRST = 4


def some_plans(rng: random.Random) -> list[PromptPlan]:
    plans = []
    for _ in range(rng.randint(1, 3)):
        budget = FIRST + WINDOW + rng.randint(1, 9)
        prompt_len = budget + rng.randint(1, 20)
        plans.append(PromptPlan(prompt_len, prompt_len + WINDOW + rng.randint(0, 5), budget))
    return plans


@pytest.mark.parametrize("_round", range(4))
def test_what_stays_of_a_prompt_is_its_ends_and_the_best_between(_round, seed, rng):
    torch.manual_seed(seed)
    plans = some_plans(rng)
    scores = torch.randn(NUM_LAYERS, NUM_KV_HEADS, sum(plan.resident_len for plan in plans))
    if rng.random() < 0.5:
        # Many of them equal: the earlier ones win.
        scores = scores.round()
    # What is no number stays, and what lies in windows was never scored.
    scores[scores.abs() > 2.5] = torch.nan
    start = 0
    for plan, kept in zip(plans, choose_from_prompts(scores, plans, WINDOW), strict=True):
        own = scores[:, :, start : start + plan.prompt_len - WINDOW]
        start += plan.resident_len
        assert kept.shape == (NUM_LAYERS, NUM_KV_HEADS, plan.budget) and kept.dtype == torch.int64
        for layer in range(NUM_LAYERS):
            for head in range(NUM_KV_HEADS):
                row = [float("inf") if x != x else x for x in own[layer, head].tolist()]
                best = sorted(range(FIRST, len(row)), key=lambda j, row=row: (-row[j], j))
                middle = sorted(best[: plan.budget - FIRST - WINDOW])
                last = range(plan.prompt_len - WINDOW, plan.prompt_len)
                assert kept[layer, head].tolist() == [*range(FIRST), *middle, *last]


def make_pool(dtype: torch.dtype) -> KVBuffers:
    keys, values = ([torch.randn(NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM).to(dtype) for _ in range(NUM_LAYERS)] for _ in "kv")
    ones = [1.0] * NUM_LAYERS
    return KVBuffers.from_layers(keys, values, dtype=dtype, key_scales=ones, value_scales=ones)


class Run:
    """Requests with long prompts in a pool, the free slots, and the arguments of their compaction."""

    def __init__(self, rng: random.Random, policy: Policy, dtype: torch.dtype = torch.float32) -> None:
        self.buffers = make_pool(dtype)
        free = 1 + torch.randperm(NUM_SLOTS - 1)
        self.requests: list[DueRequest[PromptPlan]] = []
        self.new_slots = []
        shared = free[:11]
        for plan in some_plans(rng):
            own, new, free = free[11 : plan.resident_len], free[-plan.kept_len :], free[: -plan.kept_len]
            free = torch.cat([free[:11], free[plan.resident_len :]])
            # All prompts start with the same slots, as where the prefix cache has them.
            self.requests.append(DueRequest(plan, torch.cat([shared, own]), plan.resident_len))
            self.new_slots.append(new)
        self.queries = torch.randn(NUM_LAYERS, len(self.requests), WINDOW, 2 * NUM_KV_HEADS, HEAD_DIM)
        self.policy = policy
        self.model = model_with_statistics(NUM_LAYERS, 2 * NUM_KV_HEADS, HEAD_DIM)

    def compact(self, way=compact_prompts, *before: object, policy: Policy | None = None):
        return way(
            *before,
            self.buffers,
            self.requests,
            self.new_slots,
            lambda part, layers: self.queries[layers, part],
            policy or self.policy,
            WINDOW,
            model=self.model,
        )

    def verified(self, way=compact_prompts):
        return self.compact(compact_prompts_and_verify, way, torch.cat([r.slots for r in self.requests]).unique())


def test_each_head_gets_copies_of_what_it_keeps_and_nothing_else_is_written(seed, rng, monkeypatch):
    torch.manual_seed(seed)
    # Together or each by itself, all layers at once or some.
    most_tokens = rng.choice([0, 15, 60, 1000])
    monkeypatch.setattr(compact, "most_tokens_together", lambda *_: most_tokens)
    run = Run(rng, make_policy(PolicyConfig(policy="snapkv")), rng.choice([torch.float32, torch.bfloat16]))
    run.requests = [replace(request, wants_indices=True) for request in run.requests]
    pools = [tensor[:, 0] for part in (run.buffers.keys, run.buffers.values) for tensor in part.tensors]
    before = [pool.clone() for pool in pools]
    chosen = run.compact()
    untouched = torch.ones(NUM_SLOTS, dtype=torch.bool)
    untouched[torch.cat(run.new_slots)] = False
    for number, (now, was) in enumerate(zip(pools, before, strict=True)):
        assert torch.equal(now[untouched], was[untouched])
        for request, slots, kept in zip(run.requests, run.new_slots, chosen, strict=True):
            plan = request.plan
            for head in range(NUM_KV_HEADS):
                rows = torch.cat([kept[number % NUM_LAYERS, head], torch.arange(plan.prompt_len, plan.resident_len)])
                assert torch.equal(now[slots, head], was[request.slots[rows], head])


@pytest.mark.parametrize("name", PER_HEAD)
def test_a_right_compaction_of_prompts_passes_the_check_and_another_choice_does_not(name, seed, rng):
    torch.manual_seed(seed)
    run = Run(rng, make_policy(PolicyConfig(policy=name, kernel_size=1)), rng.choice([torch.float32, torch.bfloat16]))
    assert run.verified() == [None] * len(run.requests)

    class Opposite:
        needs_values = True

        def score(self, inputs: object) -> torch.Tensor:
            return -as_scored(run.policy.score(inputs)).scores  # type: ignore[arg-type]

    def wrong(*args: object, **others: object):
        return compact_prompts(*args[:4], Opposite(), *args[5:], **others)  # type: ignore[arg-type]

    with pytest.raises(CompactionDiffersError, match="layer 0 kept other tokens than the policy's score says"):
        run.verified(wrong)


def write_shared(run: Run, kept: torch.Tensor) -> None:
    run.buffers.keys.tensors[1][run.requests[0].slots[0]] += 1


def write_own(run: Run, kept: torch.Tensor) -> None:
    run.buffers.values.tensors[0][run.requests[0].slots[-1]] *= -1


def lose_a_bit(run: Run, kept: torch.Tensor) -> None:
    run.buffers.values.tensors[2][run.new_slots[0][-1]].view(torch.uint8)[0, 0, 0] ^= 1


def forget_an_end(run: Run, kept: torch.Tensor) -> None:
    free = [i for i in range(kept.shape[2] + 1) if i not in kept[0, 0].tolist()]
    kept[0, 0] = torch.cat([kept[0, 0, :-1], torch.tensor(free[:1])]).sort().values


def keep_one_twice(run: Run, kept: torch.Tensor) -> None:
    kept[1, 1, 5] = kept[1, 1, 4]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write_shared, "wrote slots that were in use"),
        (write_own, "wrote slots that were in use"),
        (lose_a_bit, "the values copied are not those kept"),
        (forget_an_end, "the first 4 and the last 3 tokens are not kept"),
        (keep_one_twice, "different ones in ascending order"),
    ],
)
def test_what_is_wrong_with_a_prompts_compaction_is_named_in_one_line(spoil, message, seed, rng):
    torch.manual_seed(seed)
    run = Run(rng, make_policy(PolicyConfig()))

    def wrong(*args: object, **others: object):
        done = compact_prompts(*args, **others)  # type: ignore[arg-type]
        spoil(run, done[0])
        return done

    with pytest.raises(CompactionDiffersError, match=message) as caught:
        run.verified(wrong)
    assert "\n" not in str(caught.value)


def test_a_copy_of_whole_tokens_is_checked_to_the_last_bit(seed, rng):
    torch.manual_seed(seed)
    layers = [torch.randn(40, 2, 8), torch.randn(40, 1, 12).bfloat16()]
    shared, slots, new = torch.randperm(39).add(1).split([9, 12, 18])
    before = [layer.clone() for layer in layers]
    copy_slots_and_verify(copy_slots, shared, layers, slots, new[:12])
    for layer, was in zip(layers, before, strict=True):
        was[new[:12]] = was[slots]
        assert torch.equal(layer, was)
    spoilt = rng.choice([shared[3], slots[0]])

    def writing(layers, slots, new_slots):
        copy_slots(layers, slots, new_slots)
        layers[1][spoilt] += 1

    def swapping(layers, slots, new_slots):
        copy_slots(layers, slots.flip(0), new_slots)

    for wrong, message in ((writing, "wrote slots that were in use"), (swapping, "was not copied as it was")):
        with pytest.raises(CompactionDiffersError, match=message):
            copy_slots_and_verify(wrong, shared, layers, slots, new[:12])
