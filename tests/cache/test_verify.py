"""A checked compaction passes when it is right, and names what is wrong with it when it is not."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import Compacted, DueRequest, compact_requests
from rkv_sglang.cache.verify import CompactionDiffersError, compact_and_verify
from rkv_sglang.config import PolicyConfig
from rkv_sglang.policies import POLICIES, Policy, ScoreInputs, as_scored, make_policy
from rkv_sglang.sizes.compaction_plan import plan_compaction
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

    class Opposite:
        needs_values = True

        def score(self, inputs: object) -> torch.Tensor:
            return -as_scored(make_policy(PolicyConfig(policy=name, kernel_size=1)).score(inputs)).scores  # type: ignore[arg-type]

    def wrong(
        buffers: KVBuffers, due: list[DueRequest], queries: object, policy: Policy, *args: object, **kwargs: object
    ):
        return compact_requests(buffers, due, queries, Opposite(), *args, **kwargs)  # type: ignore[arg-type]

    with pytest.raises(CompactionDiffersError, match="layer 0 kept other tokens than the policy's score says"):
        verified(
            wrong, make_pool(torch.float32), some_requests(rng), make_policy(PolicyConfig(policy=name, kernel_size=1))
        )
