"""Attention over one layer's cache."""

import torch
import torch.nn.functional as F


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what the last ``n`` of ``length`` tokens attend to, ``[num_qo_heads, n, head_dim]``.

    Args:
        queries: Theirs, ``[num_qo_heads, n, head_dim]``.
        keys, values: ``[num_kv_heads, length, head_dim]``.
        visible: ``[n, length]``; None: a token sees all up to itself.
        sinks: One more logit of each query head, which takes weight and gives no value.
    """
    num_tokens, length = queries.shape[1], keys.shape[1]
    if sinks is None:
        (attended,) = F.scaled_dot_product_attention(
            *(own.unsqueeze(0) for own in (queries, keys, values)),
            attn_mask=visible,
            is_causal=num_tokens == length and visible is None,
            scale=scale,
            enable_gqa=True,
        )
        return attended
    if visible is None:
        visible = torch.ones(num_tokens, length, dtype=torch.bool).tril(length - num_tokens)
    group = queries.shape[0] // keys.shape[0]
    logits = scale * queries @ keys.repeat_interleave(group, dim=0).mT
    logits = logits.masked_fill(~visible, float("-inf"))
    logits = torch.cat([logits, sinks[:, None, None].expand(-1, num_tokens, 1)], dim=2)
    return logits.softmax(dim=-1)[:, :, :length] @ values.repeat_interleave(group, dim=0)
