"""A policy tried on made-up tokens, so that one whose scores are none is refused before it serves anybody."""

import torch
from torch import Tensor

from rkv_sglang.messages import one_line
from rkv_sglang.policies import Policy, ScoreInputs, needs_values

PROMPT_LEN = 2


@torch.no_grad()
def score_problem(
    policy: Policy,
    *,
    window: int,
    capacity: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    device: torch.device | str,
) -> str | None:
    """Return in one line what is wrong with what the policy scores, or None. Waits for the device.

    Args:
        capacity: Generated tokens at which a request is compacted; the shapes are those of the server.
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
    )
    try:
        scores = policy.score(inputs)
    # Whatever somebody's code raises.
    except Exception as error:
        return f"its score raises {type(error).__name__}: {one_line(error)}"
    wanted = [num_kv_heads, num_tokens - window]
    if not isinstance(scores, Tensor):
        return f"its score is of type {type(scores).__name__} instead of a tensor {wanted} of torch.float32"
    if list(scores.shape) != wanted or scores.dtype != torch.float32:
        return f"its score is {list(scores.shape)} of {scores.dtype} instead of {wanted} of torch.float32"
    if scores.device != inputs.keys.device:
        return f"its score is on {scores.device} instead of {inputs.keys.device}"
    return "its score has NaN in it" if scores[:, PROMPT_LEN:].isnan().any().item() else None
