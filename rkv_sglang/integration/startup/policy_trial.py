"""A policy tried on made-up tokens, so that one whose scores are none is refused before it serves anybody."""

from dataclasses import replace

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.messages import one_line
from rkv_sglang.policies import (
    Policy,
    Scored,
    ScoreInputs,
    needs_statistics,
    needs_values,
    observed_numbers,
    observes,
)

PROMPT_LEN = 2


@torch.no_grad()
def score_problem(
    policy: Policy,
    *,
    window: int,
    budget: int,
    capacity: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    model: ModelAttention = PLAIN_ATTENTION,
    device: torch.device | str,
) -> str | None:
    """Return in one line what is wrong with what the policy scores, or None. Waits for the device.

    Args:
        budget: Generated tokens that are kept.
        capacity: Generated tokens at which a request is compacted; the shapes are those of the server.
        model: How the model attends; statistics of its queries may still be all 0.
    """
    num_tokens = PROMPT_LEN + capacity
    draw = torch.Generator().manual_seed(0)

    def made_up(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    inputs = ScoreInputs(
        queries=made_up(window, num_qo_heads, head_dim),
        keys=made_up(num_tokens, num_kv_heads, head_dim),
        prompt_len=PROMPT_LEN,
        values=made_up(num_tokens, num_kv_heads, v_head_dim) if needs_values(policy) else None,
        logical_len=num_tokens,
        budget=budget,
        model=model,
    )
    if observes(policy):
        try:
            numbers, layers = observed_numbers(policy, budget, window), policy.observed_layers([0, 1])  # type: ignore[attr-defined]
            observed = policy.observe(iter([inputs] * len(layers)))  # type: ignore[attr-defined]
        except Exception as error:
            return f"what it observes raises {type(error).__name__}: {one_line(error)}"
        if not isinstance(observed, Tensor) or observed.device != inputs.keys.device or observed.numel() > numbers:
            return f"what it observes is no tensor on {inputs.keys.device} of at most {numbers} numbers"
        inputs = replace(inputs, observed=observed)
    try:
        scored = policy.score(inputs)
    # Whatever somebody's code raises.
    except Exception as error:
        return f"its score raises {type(error).__name__}: {one_line(error)}"
    wanted = [num_kv_heads, num_tokens - window]
    parts = {"score": scored.scores, "state": scored.state} if isinstance(scored, Scored) else {"score": scored}
    for name, part in parts.items():
        # What stays may be said instead of scored.
        dtypes = (torch.float32, torch.bool) if name == "score" else (torch.float32,)
        problem = _problem_of(part, wanted, dtypes, inputs.keys.device)
        if problem is not None:
            return f"its {name} {problem}"
        # Of statistics that are all 0 nothing can be asked.
        if not needs_statistics(policy) and part[:, PROMPT_LEN:].isnan().any().item():
            return f"its {name} has NaN in it"
    return None


def _problem_of(part: object, wanted: list[int], dtypes: tuple[torch.dtype, ...], device: torch.device) -> str | None:
    if not isinstance(part, Tensor):
        return f"is of type {type(part).__name__} instead of a tensor {wanted} of torch.float32"
    if list(part.shape) != wanted or part.dtype not in dtypes:
        return f"is {list(part.shape)} of {part.dtype} instead of {wanted} of torch.float32"
    return None if part.device == device else f"is on {part.device} instead of {device}"
