"""A checked compaction passes when it is right, and names what is wrong with it when it is not."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.cache.block_choice import BlockChoice, choose_by_place, choose_by_scores
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import Compacted, DueRequest, compact_requests
from rkv_sglang.cache.drop import drop_blocks
from rkv_sglang.cache.verify.drop import choose_by_place_and_verify, choose_by_scores_and_verify, drop_and_verify
from rkv_sglang.cache.verify.gather import compact_and_verify
from rkv_sglang.cache.verify.recomputed import CompactionDiffersError
from rkv_sglang.config import PolicyConfig
from rkv_sglang.policies import POLICIES, Policy, ScoreInputs, as_scored, granularities_of, is_blind, make_policy
from rkv_sglang.sizes.compaction_plan import LEAST_BLOCK, DropPlan, plan_compaction, plan_drop
from tests.policies.cases import model_with_statistics

NUM_LAYERS, NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM, WINDOW = 2, 160, 2, 8, 3
SHARED = torch.arange(140, 160)


def make_pool(dtype: torch.dtype) -> KVBuffers:
    keys, values = ([torch.randn(NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2)] for _ in "kv")
    ones = [1.0] * NUM_LAYERS
    return KVBuffers.from_layers(keys, values, dtype=dtype, key_scales=ones, value_scales=ones)


def some_requests(rng: random.Random) -> list[DueRequest]:
    free, requests = 1 + torch.randperm(139), []
    for _ in range(rng.randint(1, 3)):
        # With one token of a prompt at least, so that there is one to spoil.
        prompt_len, budget = rng.randint(1, 12), WINDOW + rng.randint(1, 8)
        resident_len = prompt_len + budget + rng.randint(1, 9)
        plan = plan_compaction(prompt_len=prompt_len, resident_len=resident_len, budget=budget, page_size=1)
        requests.append(DueRequest(plan, free[:resident_len], resident_len))
        free = free[resident_len:]
    return requests


def verified(
    compact: Callable[..., list[Compacted]], buffers: KVBuffers, requests: list[DueRequest], policy: Policy
) -> list[Compacted]:
    queries = torch.randn(NUM_LAYERS, len(requests), WINDOW, 2 * NUM_KV_HEADS, HEAD_DIM)
    model = model_with_statistics(NUM_LAYERS, 2 * NUM_KV_HEADS, HEAD_DIM)
    return compact_and_verify(
        compact, SHARED, buffers, requests, lambda part, layers: queries[layers, part], policy, WINDOW, model=model
    )


@pytest.mark.parametrize("name", POLICIES)
def test_a_right_compaction_passes_and_is_returned_as_it_is(name, seed, rng):
    torch.manual_seed(seed)
    policy = make_policy(PolicyConfig(policy=name))
    buffers = make_pool(rng.choice([torch.float32, torch.bfloat16]))
    requests = [replace(request, wants_indices=rng.random() < 0.5) for request in some_requests(rng)]
    compacted = verified(compact_requests, buffers, requests, policy)
    assert [result.kept_indices is not None for result in compacted] == [request.wants_indices for request in requests]


@dataclass(frozen=True)
class Oldest(Policy):
    """Keeps the oldest tokens, so never the latest ones."""

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        num_scored = len(inputs.keys) - len(inputs.queries)
        return torch.arange(num_scored, 0, -1).float().expand(inputs.keys.shape[1], -1)


def test_a_layer_that_slides_must_keep_the_latest(seed, rng):
    torch.manual_seed(seed)
    buffers, requests = make_pool(torch.float32), some_requests(rng)
    queries = torch.randn(NUM_LAYERS, len(requests), WINDOW, 2 * NUM_KV_HEADS, HEAD_DIM)
    read_queries, policy = lambda part, layers: queries[layers, part], Oldest()
    model = ModelAttention(sliding_layers=frozenset({1}))
    compact_and_verify(compact_requests, SHARED, buffers, requests, read_queries, policy, WINDOW, model=model)

    def forgets(*args: object, **others: object) -> list[Compacted]:
        return compact_requests(*args, **{**others, "model": PLAIN_ATTENTION})  # type: ignore[arg-type]

    with pytest.raises(CompactionDiffersError, match="layer 1 attends to the latest tokens alone and kept others"):
        compact_and_verify(forgets, SHARED, buffers, requests, read_queries, policy, WINDOW, model=model)


def slot(request: DueRequest, position: int) -> int:
    return int(request.slots[position])


def spoil_prompt(buffers: KVBuffers, request: DueRequest, result: Compacted) -> Compacted:
    buffers.keys.tensors[1][slot(request, 0)] += 1
    return result


def spoil_shared(buffers: KVBuffers, request: DueRequest, result: Compacted) -> Compacted:
    buffers.values.tensors[0][SHARED[7]] *= -1
    return result


def swap_shared(buffers: KVBuffers, request: DueRequest, result: Compacted) -> Compacted:
    tensor = buffers.keys.tensors[0]
    tensor[SHARED[[3, 4]]] = tensor[SHARED[[4, 3]]]
    return result


def spoil_moved(buffers: KVBuffers, request: DueRequest, result: Compacted) -> Compacted:
    """The lowest bit of one number: as small as a difference gets."""
    bits = buffers.values.tensors[1][slot(request, request.plan.kept_len - 1)].view(torch.uint8)
    bits[0, 0, 0] ^= 1
    return result


def keep_less_of_the_window(buffers: KVBuffers, request: DueRequest, result: Compacted) -> Compacted:
    kept = result.kept_indices
    assert kept is not None
    free = [i for i in range(request.plan.generated_len - WINDOW) if i not in kept[1, 0].tolist()]
    kept[1, 0] = torch.cat([kept[1, 0, :-1], torch.tensor([free[-1]], dtype=kept.dtype)]).sort().values
    return result


def keep_one_twice(buffers: KVBuffers, request: DueRequest, result: Compacted) -> Compacted:
    assert result.kept_indices is not None
    result.kept_indices[0, 1, 0] = result.kept_indices[0, 1, 1]
    return result


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_prompt, "the keys of the prompt changed"),
        (spoil_shared, "the prefix cache shares"),
        (swap_shared, "the prefix cache shares"),
        (spoil_moved, "the values moved are not those kept"),
        (keep_less_of_the_window, "the newest 3 tokens are not kept"),
        (keep_one_twice, "different ones in ascending order"),
    ],
)
def test_the_first_difference_is_named_in_one_line(spoil, message, seed, rng):
    torch.manual_seed(seed)
    requests = some_requests(rng)

    def wrong(buffers: KVBuffers, due: list[DueRequest], *args: object, **kwargs: object) -> list[Compacted]:
        done = compact_requests(buffers, due, *args, **kwargs)  # type: ignore[arg-type]
        return [*done[:-1], spoil(buffers, due[-1], done[-1])]

    with pytest.raises(CompactionDiffersError, match=message) as caught:
        verified(wrong, make_pool(torch.float32), requests, make_policy(PolicyConfig()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_that_the_score_does_not_choose_are_found(name, seed, rng):
    """What is kept is moved as it should be; only the choice is another policy's."""
    torch.manual_seed(seed)

    right = make_policy(PolicyConfig(policy=name, kernel_size=1))

    class Opposite:
        needs_values = True

        def __getattr__(self, attribute: str) -> object:
            # It observes what the right one does.
            if attribute.startswith("observe"):
                return getattr(right, attribute)
            raise AttributeError(attribute)

        def score(self, inputs: object) -> torch.Tensor:
            return -as_scored(right.score(inputs)).scores  # type: ignore[arg-type]

    def wrong(
        buffers: KVBuffers, due: list[DueRequest], queries: object, policy: Policy, *args: object, **kwargs: object
    ):
        return compact_requests(buffers, due, queries, Opposite(), *args, **kwargs)  # type: ignore[arg-type]

    with pytest.raises(CompactionDiffersError, match="layer 0 kept other tokens than the policy's score says"):
        verified(wrong, make_pool(torch.float32), some_requests(rng), right)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if is_blind(policy)])
def test_a_choice_by_places_is_held_to_the_last_of_those_kept(name, seed, rng):
    """Sinks score 2^24 more than all others, whose neighbours are 1 apart."""
    torch.manual_seed(seed)
    # Of four sinks three are generated, and more than these is kept.
    plan = plan_compaction(prompt_len=1, resident_len=20, budget=WINDOW + rng.randint(4, 9), page_size=1)
    request = DueRequest(plan, 1 + torch.randperm(139)[:20], 20)
    right = make_policy(PolicyConfig(policy=name))

    class Nearly:
        needs_values = True

        def score(self, inputs: ScoreInputs) -> torch.Tensor:
            scores = as_scored(right.score(inputs)).scores.clone()
            candidates = scores[:, inputs.prompt_len :]
            # The last that is kept and the first that is not.
            both = candidates.argsort(dim=1, descending=True)[:, inputs.budget - WINDOW - 1 :][:, :2]
            candidates.scatter_(1, both, candidates.gather(1, both.flip(1)))
            return scores

    def wrong(
        buffers: KVBuffers, due: list[DueRequest], queries: object, policy: Policy, *args: object, **kwargs: object
    ):
        return compact_requests(buffers, due, queries, Nearly(), *args, **kwargs)  # type: ignore[arg-type]

    with pytest.raises(CompactionDiffersError, match="layer 0 kept other tokens than the policy's score says"):
        verified(wrong, make_pool(torch.float32), [request], right)


# Compaction by the map alone.

WHOLE = [name for name, policy in POLICIES.items() if "request" in granularities_of(policy)]
BY_PLACE = [name for name in WHOLE if is_blind(POLICIES[name])]


def some_drops(rng: random.Random) -> list[DueRequest[DropPlan]]:
    """One or two requests; the first may drop one of at least two blocks."""
    free, requests = 1 + torch.randperm(139), []
    for _ in range(rng.randint(1, 2)):
        prompt_len, budget = rng.randint(0, 5), WINDOW + 2 * LEAST_BLOCK
        plan = plan_drop(
            prompt_len=prompt_len,
            resident_len=prompt_len + budget + LEAST_BLOCK,
            budget=budget,
            window=WINDOW,
            block=LEAST_BLOCK,
        )
        requests.append(DueRequest(plan, free[: plan.resident_len], plan.resident_len))
        free = free[plan.resident_len :]
    return requests


def chosen(choose: Callable[..., list[BlockChoice]], name: str, requests: list[DueRequest]) -> list[BlockChoice]:
    """Choose, checked, by places or by scores, as the policy of this name does."""
    policy = make_policy(PolicyConfig(policy=name, granularity="request", buffer=16, block=16))
    if name in BY_PLACE:
        return choose_by_place_and_verify(
            choose, [(due.plan, due.logical_len, None) for due in requests], policy, WINDOW
        )
    queries = torch.randn(NUM_LAYERS, len(requests), WINDOW, 2 * NUM_KV_HEADS, HEAD_DIM)
    buffers = make_pool(torch.float32)
    return choose_by_scores_and_verify(
        choose, SHARED, buffers, requests, lambda part, layers: queries[layers, part], policy, WINDOW
    )


@pytest.mark.parametrize("name", WHOLE)
def test_a_right_choice_of_blocks_passes_and_another_one_is_found(name, seed, rng):
    torch.manual_seed(seed)
    right = choose_by_place if name in BY_PLACE else choose_by_scores
    requests = some_drops(rng)
    assert len(chosen(right, name, requests)) == len(requests)

    def another(*args: object, **kwargs: object) -> list[BlockChoice]:
        first, *rest = right(*args, **kwargs)  # type: ignore[operator]
        kept, dropped = first.kept.clone(), first.dropped.clone()
        kept[-1], dropped[-1] = first.dropped[-1], first.kept[-1]
        return [BlockChoice(kept.sort().values, dropped.sort().values), *rest]

    def once_too_often(*args: object, **kwargs: object) -> list[BlockChoice]:
        first, *rest = right(*args, **kwargs)  # type: ignore[operator]
        return [BlockChoice(first.kept, first.kept[:1]), *rest]

    with pytest.raises(CompactionDiffersError, match="not those of the lowest mean score"):
        chosen(another, name, requests)
    with pytest.raises(CompactionDiffersError, match="it keeps the blocks"):
        chosen(once_too_often, name, requests)


def test_a_choice_that_writes_the_cache_is_found(seed, rng):
    torch.manual_seed(seed)
    requests = some_drops(rng)

    def writing(buffers: KVBuffers, *args: object, **kwargs: object) -> list[BlockChoice]:
        buffers.values.tensors[1][requests[0].slots[-1]] += 1
        return choose_by_scores(buffers, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.raises(CompactionDiffersError, match="changed the KV cache"):
        chosen(writing, "rkv", requests)


def free_in_another_order(req_to_token: torch.Tensor, freed: torch.Tensor) -> torch.Tensor:
    return freed.flip(0)


def free_too_little(req_to_token: torch.Tensor, freed: torch.Tensor) -> torch.Tensor:
    return freed[:-1]


def spoil_own_row(req_to_token: torch.Tensor, freed: torch.Tensor) -> torch.Tensor:
    req_to_token[0, 7] += 1
    return freed


def spoil_another_row(req_to_token: torch.Tensor, freed: torch.Tensor) -> torch.Tensor:
    req_to_token[1, 5] += 1
    return freed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (free_in_another_order, "pages were freed that are not those"),
        (free_too_little, "pages were freed that are not those"),
        (spoil_own_row, "the row is not what stays"),
        (spoil_another_row, "changed another request's row"),
    ],
)
def test_rows_and_pages_that_differ_from_the_choice_are_found(spoil, message, seed, rng):
    torch.manual_seed(seed)
    request = some_drops(rng)[0]
    (choice,) = chosen(choose_by_place, "random", [request])
    req_to_token = torch.zeros(2, 64, dtype=torch.int32)
    req_to_token[0, : request.plan.resident_len] = request.slots
    arguments = ([0], [request.plan], [choice], 1)
    assert len(drop_and_verify(drop_blocks, req_to_token.clone(), *arguments)) == LEAST_BLOCK

    def wrong(*args: object) -> torch.Tensor:
        return spoil(req_to_token, drop_blocks(*args))  # type: ignore[arg-type]

    with pytest.raises(CompactionDiffersError, match=message):
        drop_and_verify(wrong, req_to_token, *arguments)
