"""A compaction with everything about it checked: what was kept, what was moved, and what must not change.

For tests and for whoever doubts a server: it reads and copies what each due request holds and waits for the device,
many times over. A server does so with ``RKV_SGLANG_VERIFY=1``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rkv_sglang.algorithm import reference
from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import Compacted, DueRequest
from rkv_sglang.kernels.paged_batch import FP8_DTYPES, PagedBuffers
from rkv_sglang.policies import RKV, Policy, ScoreInputs, as_scored
from rkv_sglang.sizes.compaction_plan import GatherPlan

# Of the spread of a head's scores: below this, which of two tokens is kept is a matter of the order of summation.
SCORE_TOLERANCE = 1e-4
# As near to the threshold a cosine may fall on either side of it.
COSINE_TOLERANCE = 1e-6
_LARGE_ODD = 0x9E3779B97F4A7C15 - 2**64


class CompactionDiffersError(RuntimeError):
    """A compaction did something else than it should; one line."""


def compact_and_verify(
    compact: Callable[..., list[Compacted]],
    shared_slots: Tensor,
    buffers: KVBuffers,
    requests: Sequence[DueRequest[GatherPlan]],
    read_queries: Callable[[slice, slice], Tensor],
    policy: Policy,
    window: int,
    *,
    query_bytes: int = 0,
    model: ModelAttention = PLAIN_ATTENTION,
) -> list[Compacted]:
    """Call ``compact`` (``compact.compact_requests``) with the other arguments and check all that it did.

    Args:
        compact: Mutates the pool; everything else here only reads it.
        shared_slots: Slots that nobody may write, in any order, int64, on the pool's device; the requests' prompts are
            checked too.

    Returns:
        What ``compact`` did, indices only where they were asked for.

    Raises:
        CompactionDiffersError: At the first difference.
    """
    before = [_rows_of(buffers, request.slots) for request in requests]
    shared = _checksums(buffers, shared_slots)
    asked = [replace(request, wants_indices=True) for request in requests]
    compacted = compact(buffers, asked, read_queries, policy, window, query_bytes=query_bytes, model=model)
    if _checksums(buffers, shared_slots) != shared:
        raise CompactionDiffersError("a compaction wrote a slot that the prefix cache shares; please report this")
    everything = slice(0, buffers.keys.num_layers)
    for number, (request, result, rows) in enumerate(zip(requests, compacted, before, strict=True)):
        queries = read_queries(slice(number, number + 1), everything)[:, 0]
        for problem in _problems(buffers, request, result, rows, queries, policy, window, model):
            raise CompactionDiffersError(
                f"compaction of {request.plan.generated_len} generated tokens to {request.plan.budget} after a prompt "
                f"of {request.plan.prompt_len}: {problem}; please report this"
            )
    return [
        result if request.wants_indices else replace(result, kept_indices=None)
        for request, result in zip(requests, compacted, strict=True)
    ]


def _problems(
    buffers: KVBuffers,
    request: DueRequest[GatherPlan],
    result: Compacted,
    before: tuple[Tensor, Tensor],
    queries: Tensor,
    policy: Policy,
    window: int,
    model: ModelAttention,
) -> Iterator[str]:
    """Yield what is wrong with one request, one line each."""
    plan, indices = request.plan, result.kept_indices
    if indices is None:
        yield "it did not say what it kept"
        return
    kept = indices.to(torch.int64)
    newest = torch.arange(plan.generated_len - window, plan.generated_len, device=kept.device)
    if kept.shape[2] != plan.budget or not bool((kept.diff(dim=2) > 0).all()) or int(kept.min()) < 0:
        yield f"the tokens kept are not {plan.budget} different ones in ascending order"
        return
    if not bool((kept[:, :, plan.budget - window :] == newest).all()):
        yield f"the newest {window} tokens are not kept"
        return
    for name, was, now in zip(("keys", "values"), before, _rows_of(buffers, request.slots), strict=True):
        if not _same_bytes(was[:, : plan.prompt_len], now[:, : plan.prompt_len]):
            yield f"the {name} of the prompt changed"
        # [num_layers, budget, num_kv_heads, 1]
        sources = plan.prompt_len + kept.transpose(1, 2).unsqueeze(3)
        moved = was.take_along_dim(sources, dim=1)
        if not _same_bytes(moved, now[:, plan.prompt_len : plan.kept_len]):
            yield f"the {name} moved are not those kept"
    sliding = model.sliding_among(buffers.keys.first_layer, len(kept))
    latest = torch.arange(plan.generated_len - plan.budget, plan.generated_len, device=kept.device)
    for layer in range(len(kept)):
        if layer in sliding:
            if not bool((kept[layer] == latest).all()):
                yield f"layer {layer} attends to the latest tokens alone and kept others"
            continue
        layer_inputs = ScoreInputs(
            queries=queries[layer],
            keys=_as_numbers(buffers.keys, before[0], layer),
            prompt_len=plan.prompt_len,
            values=_as_numbers(buffers.values, before[1], layer),
            logical_len=request.logical_len,
            state=None if request.kept_state is None else request.kept_state[layer],
            memory=None if request.memory is None else request.memory[layer],
            layer=buffers.keys.first_layer + layer,
            first_kv_head=buffers.keys.first_kv_head,
            budget=plan.budget,
            model=model,
        )
        if not any(_explains(scores, kept[layer], plan.prompt_len, window) for scores in _scores(policy, layer_inputs)):
            yield f"layer {layer} kept other tokens than the policy's score says"


def _scores(policy: Policy, inputs: ScoreInputs) -> Iterator[Tensor]:
    """Yield the scores by the plainest way there is; several where a rounding error decides between them."""
    if type(policy) is not RKV:
        yield as_scored(policy.score(inputs)).scores
        return
    for shift in (0.0, COSINE_TOLERANCE, -COSINE_TOLERANCE):
        yield reference.rkv_scores(
            inputs.queries,
            inputs.keys,
            mix_lambda=policy.mix_lambda,
            kernel_size=policy.kernel_size,
            similarity_threshold=min(max(policy.similarity_threshold + shift, -1.0), 1.0),
            model=inputs.model,
        )


def _explains(scores: Tensor, kept: Tensor, prompt_len: int, window: int) -> bool:
    """Return whether those kept are the best, or as good as the best but for a rounding error.

    Args:
        scores: ``[num_kv_heads, L - window]``.
        kept: Indices of generated tokens, ``[num_kv_heads, budget]``, ascending, the window at the end.
    """
    budget = kept.shape[1]
    if torch.equal(reference.select_kept(scores, prompt_len, window, budget), kept):
        return True
    candidates = scores[:, prompt_len:]
    is_kept = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, kept[:, : budget - window], True)
    worst_kept = candidates.masked_fill(~is_kept, torch.inf).amin(dim=1)
    best_dropped = candidates.masked_fill(is_kept, -torch.inf).amax(dim=1)
    spread = candidates.amax(dim=1) - candidates.amin(dim=1)
    return bool((worst_kept >= best_dropped - SCORE_TOLERANCE * spread).all())


def _rows_of(buffers: KVBuffers, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Copy what some slots hold, ``[num_layers, len(slots), num_kv_heads, head_dim]`` of keys and of values."""
    both = (buffers.keys, buffers.values)
    keys, values = (torch.stack([layer.flatten(0, 1)[slots] for layer in part.tensors]) for part in both)
    return keys, values


def _as_numbers(buffers: PagedBuffers, rows: Tensor, layer: int) -> Tensor:
    """Return copied rows of one layer as fp32."""
    if buffers.dtype in FP8_DTYPES:
        return rows[layer].view(buffers.dtype).float() * buffers.scales[layer]
    return rows[layer].float()


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _checksums(buffers: KVBuffers, slots: Tensor) -> list[int]:
    """Return a number for each layer's keys and values in these slots, by their bytes and order."""
    sums = []
    for part in (buffers.keys, buffers.values):
        for layer in part.tensors:
            numbers = layer.flatten(0, 1)[slots].contiguous().view(torch.uint8).flatten().to(torch.int64)
            # int64 wraps around, which is all right for a checksum.
            weights = torch.arange(1, numbers.numel() + 1, device=numbers.device) * _LARGE_ODD
            sums.append(int((numbers * (weights ^ (weights >> 31))).sum()))
    return sums
