"""Compile every kernel that a server will run before its first request, so that none waits for it."""

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.kernels.capture import LAYERS_PER_LAUNCH, capture_queries
from rkv_sglang.kernels.dispatch import compact_paged, runs_triton
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.policies import Policy

# A kernel is compiled anew for integers that are 1 or divisible by 16, so both numbers of requests are run.
NUM_REQUESTS = (1, 3)


def warm_up(
    keys: PagedBuffers,
    values: PagedBuffers,
    query_rings: Tensor,
    row_of_request: Tensor,
    policy: Policy,
    *,
    budget: int,
    capacity: int,
    model: ModelAttention = PLAIN_ATTENTION,
) -> None:
    """Run compaction and query capture once at the served shapes; on a CPU do nothing.

    Compacts made-up requests whose every token lies in slot 0, where nothing is ever read: what is moved are copies of
    slot 0 onto itself. Captures for a request without a row. So nothing that matters changes, but no other stream may
    use slot 0 meanwhile. Call it before CUDA graphs are captured.

    Args:
        keys, values: All layers of a pool of slots.
        query_rings: ``[num_layers, num_rows + 1, window, num_qo_heads, head_dim]``, the dtype of served queries.
        row_of_request: ``[max_requests]``, int64; its entry 0 is 0.
        policy: The policy served.
        budget: Generated tokens kept.
        capacity: Generated tokens at which a request is compacted.
        model: How the model attends.

    Raises:
        ValueError: The kernels do not support a shape or dtype of what is served.
    """
    if not runs_triton(keys):
        return
    num_layers, _, window, num_qo_heads, head_dim = query_rings.shape
    for num_requests in NUM_REQUESTS:
        batch = PagedBatch.from_slots(
            torch.zeros(num_requests * capacity, dtype=torch.int64, device=keys.device),
            kv_lens=[capacity] * num_requests,
            prompt_lens=[0] * num_requests,
            budgets=[budget] * num_requests,
            window=window,
        )
        compact_paged(
            keys,
            values,
            batch,
            query_rings.new_zeros(num_layers, num_requests, window, num_qo_heads, head_dim),
            policy,
            model=model,
        )
        indices = row_of_request.new_zeros(num_requests)
        queries = query_rings.new_zeros(num_requests, num_qo_heads * head_dim)
        for rings in torch.split(query_rings, LAYERS_PER_LAUNCH):
            capture_queries(rings, row_of_request, [queries] * len(rings), indices, indices)
    torch.cuda.synchronize(keys.device)
