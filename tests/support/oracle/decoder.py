"""A Llama or Qwen3 decoder over one dense cache per layer, in which every KV head has kept tokens of its own."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

# What a Granite has beside the factor of its logits.
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


@cache
def load_model(path: Path) -> PreTrainedModel:
    """Read a checkpoint as fp32 on the CPU; the same object for the same path."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Fp8:
    """What an fp8 pool makes of keys and values: they are divided by their layer's factor, rounded, and multiplied.

    Attributes:
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scales: Of each layer the factors of keys and of values.
    """

    dtype: torch.dtype
    scales: tuple[tuple[float, float], ...]

    def rounded(self, numbers: torch.Tensor, scale: float) -> torch.Tensor:
        return (numbers / scale).to(self.dtype).float() * scale


class LayerCache:
    """Resident keys and values of one layer, temporal order, with the logical position of every entry.

    The buffers are ``[num_kv_heads, capacity, head_dim]`` and ``[num_kv_heads, capacity]``; the first ``length``
    entries are valid. ``queries`` holds the last ``window`` decode queries, each ``[num_qo_heads, head_dim]``;
    ``memory`` one number for every logical position, ``[num_kv_heads, capacity]``, and ``beacons`` old queries, for
    policies that have a memory.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        window: int,
        rounding: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        self._keys = torch.full((num_kv_heads, capacity, head_dim), float("nan"))
        self._values = torch.full((num_kv_heads, capacity, head_dim), float("nan"))
        self._positions = torch.full((num_kv_heads, capacity), -1, dtype=torch.int64)
        self._rounding = rounding
        self.memory = torch.zeros(num_kv_heads, capacity)
        self.beacons: list[torch.Tensor] = []
        self.length = 0
        self.queries: deque[torch.Tensor] = deque(maxlen=window)

    @property
    def keys(self) -> torch.Tensor:
        return self._keys[:, : self.length]

    @property
    def values(self) -> torch.Tensor:
        return self._values[:, : self.length]

    @property
    def positions(self) -> torch.Tensor:
        return self._positions[:, : self.length]

    def clear(self) -> None:
        """Forget all tokens and queries, and what was remembered of them."""
        self.memory.zero_()
        self.beacons.clear()
        self.length = 0
        self.queries.clear()

    def drop_last(self) -> None:
        """Drop the newest entry of every head."""
        self.length -= 1

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        """Add ``n`` tokens: keys and values ``[num_kv_heads, n, head_dim]``, positions ``[n]``."""
        end = self.length + keys.shape[1]
        if self._rounding is not None:
            keys, values = self._rounding(keys, values)
        self._keys[:, self.length : end] = keys
        self._values[:, self.length : end] = values
        self._positions[:, self.length : end] = positions
        self.length = end

    def keep(self, kept_indices: torch.Tensor) -> None:
        """Drop all entries but ``kept_indices``, ``[num_kv_heads, n]``, sorted; they count resident entries."""
        rows = kept_indices.unsqueeze(-1)
        new_len = kept_indices.shape[1]
        self._keys[:, :new_len] = self.keys.take_along_dim(rows, dim=1)
        self._values[:, :new_len] = self.values.take_along_dim(rows, dim=1)
        self._positions[:, :new_len] = self.positions.take_along_dim(kept_indices, dim=1)
        self.length = new_len


class Decoder:
    """Runs the modules of a transformers model over caches of our own.

    Raises:
        ValueError: The model is neither Llama, Qwen3 nor a Granite without multipliers but that of attention, or does
            not attend to all earlier tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        if config.model_type not in ("llama", "qwen3", "granite") or getattr(config, "use_sliding_window", False):
            raise ValueError(f"the dense oracle knows Llama and Qwen3 with full attention, not {config.model_type!r}")
        if {getattr(config, name, 1.0) for name in MULTIPLIERS} != {1.0}:
            raise ValueError(f"the dense oracle multiplies by none of {', '.join(MULTIPLIERS)}")
        self.model: Any = model
        self.num_kv_heads: int = config.num_key_value_heads
        # A Granite's configuration has none.
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.logit_scale: float = model.model.layers[0].self_attn.scaling  # type: ignore[union-attr,assignment]

    def new_caches(self, capacity: int, window: int, fp8: Fp8 | None = None) -> list[LayerCache]:
        """Return one empty cache per layer."""

        def rounding(layer: int) -> Any:
            if fp8 is None:
                return None
            k_scale, v_scale = fp8.scales[layer]
            return lambda keys, values: (fp8.rounded(keys, k_scale), fp8.rounded(values, v_scale))

        layers = range(self.model.config.num_hidden_layers)
        return [LayerCache(self.num_kv_heads, self.head_dim, capacity, window, rounding(layer)) for layer in layers]

    def forward(self, token_ids: list[int], first_position: int, caches: list[LayerCache]) -> torch.Tensor:
        """Feed tokens at consecutive logical positions and return the logits after the last, ``[vocab_size]``, fp32.

        The caches are empty: full causal attention, and no query is remembered. Appends to the caches.
        """
        if caches[0].length:
            raise ValueError(f"the caches hold {caches[0].length} tokens: feed one by one, or clear them")
        hidden, _ = self._forward_layers(token_ids, first_position, caches)
        return self._logits(hidden[-1:])[0]

    def _forward_layers(
        self, token_ids: list[int], first_position: int, caches: list[LayerCache]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the last layer's output ``[n, hidden_size]`` and each layer's queries ``[num_qo_heads, n, head_dim]``.

        Every token sees all resident ones and those fed before it. Appends to the caches.
        """
        num_tokens, num_resident = len(token_ids), caches[0].length
        decoder = self.model.model
        hidden = decoder.embed_tokens(torch.tensor(token_ids))
        positions = torch.arange(first_position, first_position + num_tokens)
        cos, sin = (table[0] for table in decoder.rotary_emb(hidden.unsqueeze(0), positions.unsqueeze(0)))
        visible = None
        if num_resident and num_tokens > 1:
            visible = torch.ones(num_tokens, num_resident + num_tokens, dtype=torch.bool).tril(num_resident)
        all_queries = []
        for layer, layer_cache in zip(decoder.layers, caches, strict=True):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            queries = _split_heads(attention.q_proj(normed), self.head_dim, getattr(attention, "q_norm", None))
            keys = _split_heads(attention.k_proj(normed), self.head_dim, getattr(attention, "k_norm", None))
            values = _split_heads(attention.v_proj(normed), self.head_dim, None)
            queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin, unsqueeze_dim=0)
            layer_cache.append(keys, values, positions)
            all_queries.append(queries)
            attended = F.scaled_dot_product_attention(
                queries.unsqueeze(0),
                layer_cache.keys.unsqueeze(0),
                layer_cache.values.unsqueeze(0),
                attn_mask=visible,
                is_causal=not num_resident,
                scale=self.logit_scale,
                enable_gqa=True,
            )
            hidden = hidden + attention.o_proj(attended[0].transpose(0, 1).reshape(num_tokens, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden, all_queries

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits


class DecodeSteps:
    """Decode steps over the same caches, one token each; of a large model many at a time, if a guess is at hand.

    A guess of the coming tokens is fed with the token that is due. What was computed of it lies past the ``length`` of
    the caches, unseen, and counts when that very token is fed at that very place; else it is overwritten.
    """

    def __init__(self, decoder: Decoder, caches: list[LayerCache]) -> None:
        self._decoder = decoder
        self._caches = caches
        # Of each token fed ahead: the token, its logical position, the tokens resident before it; logits and queries.
        self._ahead: deque[tuple[tuple[int, int, int], torch.Tensor, list[torch.Tensor]]] = deque()

    def feed(self, token_id: int, position: int, guess: Sequence[int] = ()) -> torch.Tensor:
        """Append one token to the caches, remember its queries, return the logits after it, ``[vocab_size]``, fp32."""
        num_resident = self._caches[0].length
        if not self._ahead or self._ahead[0][0] != (token_id, position, num_resident):
            self._feed_ahead([token_id, *guess], position)
        _, logits, queries = self._ahead.popleft()
        for layer_cache, layer_queries in zip(self._caches, queries, strict=True):
            layer_cache.length = num_resident + 1
            layer_cache.queries.append(layer_queries)
        return logits

    def _feed_ahead(self, token_ids: list[int], position: int) -> None:
        num_resident = self._caches[0].length
        hidden, queries = self._decoder._forward_layers(token_ids, position, self._caches)
        for layer_cache in self._caches:
            layer_cache.length = num_resident
        self._ahead.clear()
        for i, (token_id, logits) in enumerate(zip(token_ids, self._decoder._logits(hidden), strict=True)):
            place = (token_id, position + i, num_resident + i)
            self._ahead.append((place, logits, [layer_queries[:, i] for layer_queries in queries]))


def _split_heads(projected: torch.Tensor, head_dim: int, norm: torch.nn.Module | None) -> torch.Tensor:
    """``[n, num_heads * head_dim]`` to ``[num_heads, n, head_dim]``, each head normed if the model does that."""
    heads = projected.view(projected.shape[0], -1, head_dim)
    return (heads if norm is None else norm(heads)).transpose(0, 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: on a busy machine, waiting for the others costs five to ten times the work itself."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
