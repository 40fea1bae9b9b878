"""Penalties on generated tokens: each request's own history decides them, whatever ran beside it and in between.

SGLang counts a request's tokens while it decodes, in tensors of its batch. A prefill starts them anew, so a request
that comes back would go on as if it had generated nothing; and under overlap scheduling a token is left out, and
another counted twice, whenever a prefill comes between two decode steps of a batch.
"""

from __future__ import annotations

from typing import Any

import torch

from rkv_sglang.integration.runtime.requests import known_state_of
from rkv_sglang.kernels.transfer import to_device


def counted_token(req: Any, number: int, lag: int) -> int:
    """Return the ``number``-th token that is counted for a request, the first being 0.

    These are its outputs; with a ``lag`` of 1, as under overlap scheduling, where the last one is not known yet, its
    prompt's last token comes before them. SGLang counts so where one request runs alone.
    """
    index = number - lag
    return int(req.origin_input_ids[-1] if index < 0 else req.output_ids[index])


def count_next_tokens(batch: Any) -> None:
    """Count one more token of every request of a batch that is about to decode.

    Mutates the penalties of ``batch.sampling_info``, as ``ScheduleBatch.cumulate_penalty_output_tokens`` does, but
    takes of each request the token whose turn it is, not the last one known.
    """
    tokens = []
    for req in batch.reqs:
        if req.beam_group is not None:
            # Its lengths are those of a group, and SGLang keeps it from being retracted.
            tokens.append(int((req.output_ids or req.origin_input_ids)[-1]))
            continue
        state = known_state_of(req)
        # All but the token that this step feeds are in the cache, or were.
        num_cached = req.kv.kv_allocated_len + (0 if state is None else state.evicted_tokens)
        tokens.append(counted_token(req, num_cached - len(req.origin_input_ids), _lag(batch)))
    batch.sampling_info.penalizer_orchestrator.cumulate_output_tokens(_ids(tokens, batch.device))


def count_earlier_tokens(batch: Any) -> None:
    """Give the requests of a prefill batch that have generated tokens before the penalties that these earned them.

    Mutates the penalties of ``batch.sampling_info``, which SGLang has just made.
    """
    orchestrator = batch.sampling_info.penalizer_orchestrator
    if not orchestrator.is_required:
        return
    prepared = [penalizer for penalizer in orchestrator.penalizers.values() if penalizer.is_prepared()]
    for row, req in enumerate(batch.reqs):
        num_outputs = len(req.output_ids)
        if num_outputs > 0 and req.beam_group is None:
            tokens = [counted_token(req, number, _lag(batch)) for number in range(num_outputs)]
            ids = _ids(tokens, batch.device)
            for penalizer in prepared:
                _count(penalizer, row, ids)


def _count(penalizer: Any, row: int, ids: torch.Tensor) -> None:
    """Count tokens in one row of a penalizer, each as often as it occurs: what its steps would have done one by one."""
    from sglang.srt.sampling import penaltylib

    if isinstance(penalizer, penaltylib.BatchedMinNewTokensPenalizer):
        penalizer.len_output_tokens[row] += len(ids)
    elif isinstance(penalizer, penaltylib.BatchedFrequencyPenalizer):
        penalty = penalizer.frequency_penalties[row].expand(len(ids))
        penalizer.cumulated_frequency_penalties[row].scatter_add_(0, ids, penalty)
    elif isinstance(penalizer, penaltylib.BatchedPresencePenalizer):
        penalty = penalizer.presence_penalties[row].expand(len(ids))
        penalizer.cumulated_presence_penalties[row].scatter_(0, ids, penalty)
    elif isinstance(penalizer, penaltylib.BatchedRepetitionPenalizer):
        penalty = penalizer.repetition_penalties[row].expand(len(ids))
        penalizer.cumulated_repetition_penalties[row].scatter_(0, ids, penalty)
    else:
        raise RuntimeError(
            f"a preempted request has a penalty of an unknown kind, {type(penalizer).__name__}, that cannot be put "
            "back; please report this with the request's sampling parameters"
        )


def _lag(batch: Any) -> int:
    return int(batch.enable_overlap)


def _ids(tokens: list[int], device: Any) -> torch.Tensor:
    return to_device(tokens, torch.int64, torch.device(device))
