"""Apply a compaction to the pool, in plain torch: score, select and move, layer by layer."""

import torch

from rkv_sglang.algorithm.selection import select_kept
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.plan import CompactionPlan
from rkv_sglang.config import PolicyConfig
from rkv_sglang.policies.base import Policy, ScoreInputs


def move_kept(buffer: torch.Tensor, private_slots: torch.Tensor, kept_indices: torch.Tensor) -> None:
    """Pack every head's kept entries to the front of a request's private slots.

    Mutates ``buffer`` in the first ``budget`` private slots and nowhere else.

    Args:
        buffer: One layer's key or value pool, ``[num_slots, num_kv_heads, head_dim]``.
        private_slots: Slots of the generated tokens, temporal order, ``[n]``, int64.
        kept_indices: Which of them each head keeps, sorted, ``[num_kv_heads, budget]``, int64.
    """
    num_kv_heads, budget = kept_indices.shape
    heads = torch.arange(num_kv_heads, device=kept_indices.device)[:, None]
    # The right-hand side is gathered whole before anything is written, so source and target may overlap.
    buffer[private_slots[:budget][None, :], heads] = buffer[private_slots[kept_indices], heads]


@torch.no_grad()
def compact_request(
    buffers: KVBuffers,
    plan: CompactionPlan,
    slots: torch.Tensor,
    queries: torch.Tensor,
    policy: Policy,
    config: PolicyConfig,
) -> None:
    """Keep ``config.budget`` generated tokens of one request, chosen per layer and KV head.

    Mutates the pool in the request's own slots from ``plan.prompt_len`` to ``plan.kept_len``; the prompt's slots are
    only read. Makes no device-to-host copy.

    Args:
        slots: Every resident token's slot, temporal order, ``[plan.resident_len]``, int64. A snapshot: the engine may
            rewrite its index map while this runs on another stream.
        queries: The window's queries after RoPE, oldest first, ``[num_layers, window, num_qo_heads, head_dim]``.
    """
    private_slots = slots[plan.prompt_len :]
    for layer in range(buffers.num_layers):
        inputs = ScoreInputs(queries=queries[layer], keys=buffers.gather_keys(layer, slots), prompt_len=plan.prompt_len)
        kept_indices = select_kept(policy.score(inputs), plan.prompt_len, config.window, config.budget)
        move_kept(buffers.keys[layer], private_slots, kept_indices)
        move_kept(buffers.values[layer], private_slots, kept_indices)
