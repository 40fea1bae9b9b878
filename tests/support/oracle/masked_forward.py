"""One pass of a transformers model over a whole sequence, with a visibility mask per layer and KV head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

_ATTENTION_NAME = "masked_per_kv_head"


@dataclass(frozen=True)
class MaskedForward:
    """Logits ``[T, vocab_size]``; per layer, post-RoPE queries and keys ``[num_heads, T, head_dim]``; all fp32.

    ``scaling`` is the factor of their products.
    """

    logits: torch.Tensor
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    scaling: float

    def of_first(self, num_tokens: int) -> "MaskedForward":
        """Return the pass as it would have been over the first tokens alone."""
        queries, keys = ([own[:, :num_tokens] for own in of_layers] for of_layers in (self.queries, self.keys))
        return MaskedForward(self.logits[:num_tokens], queries, keys, self.scaling)


@torch.inference_mode()
def masked_forward(model: PreTrainedModel, token_ids: Sequence[int], visible: torch.Tensor) -> MaskedForward:
    """Run ``token_ids`` at once; token ``t`` attends to ``visible[layer, kv_head, t]``.

    Args:
        visible: ``[num_layers, num_kv_heads, T, T]``, bool; every token must see at least itself.
    """
    queries: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    scalings: set[float] = set()

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **more: Any
    ) -> tuple[torch.Tensor, None]:
        scalings.add(scaling)
        queries.append(query[0])
        keys.append(key[0])
        groups = query.shape[1] // key.shape[1]
        logits = scaling * query[0] @ key[0].repeat_interleave(groups, dim=0).mT
        hidden = ~visible[module.layer_idx].repeat_interleave(groups, dim=0)
        logits = logits.masked_fill(hidden, float("-inf"))
        if (sinks := more.get("s_aux")) is not None:
            # One more number a query head, which takes weight and gives no value.
            logits = torch.cat([logits, sinks[:, None, None].expand(-1, logits.shape[1], 1)], dim=2)
        weights = logits.softmax(dim=-1)[:, :, : key.shape[2]]
        attended = weights @ value[0].repeat_interleave(groups, dim=0)
        return attended.transpose(0, 1).unsqueeze(0), None

    AttentionInterface.register(_ATTENTION_NAME, attention)
    # A model of images has another one for these.
    config = model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = _ATTENTION_NAME
    try:
        logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    finally:
        config._attn_implementation = usual
    (scale,) = scalings
    return MaskedForward(logits, queries, keys, scale)
