"""A decoder over one dense cache per layer, in which every KV head has kept tokens of its own."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.support.oracle.attention import attend
from tests.support.oracle.images import Image

# Of an image model it is the language part, whose positions of three numbers are all the same in a text.
KNOWN = ("llama", "qwen3", "granite", "qwen3_moe", "olmo3", "gpt_oss", "qwen2_5_vl_text")
# Of whose layers some attend to the latest tokens alone.
_SLIDING = ("olmo3", "gpt_oss")
# What a Granite has beside the factor of its logits.
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


@cache
def load_model(path: Path) -> PreTrainedModel:
    """Read a checkpoint as fp32 on the CPU; the same object for the same path."""
    sees_images = hasattr(AutoConfig.from_pretrained(path), "vision_config")
    kind = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Fp8:
    """What an fp8 pool makes of keys and values: they are divided by their layer's factor, rounded, and multiplied.

    Attributes:
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scales: Of each layer the factors of keys and of values.
        shaken: Draws errors as large as those of another order of summation, which come before the rounding: a number
            half-way between two may go the other way.
    """

    dtype: torch.dtype
    scales: tuple[tuple[float, float], ...]
    shaken: torch.Generator | None = None

    def rounded(self, numbers: torch.Tensor, scale: float) -> torch.Tensor:
        if self.shaken is not None:
            numbers = numbers + 2e-6 * numbers.std() * torch.randn(numbers.shape, generator=self.shaken)
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
        self.beacons: list[Any] = []
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

    def load(self, other: "LayerCache") -> None:
        """Hold what another holds, and nothing else."""
        self.clear()
        for own, theirs in (
            (self._keys, other.keys),
            (self._values, other.values),
            (self._positions, other.positions),
        ):
            own[:, : other.length] = theirs
        self.length = other.length

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

    ``image`` is one in the prompt, for a model that sees images.

    Attributes:
        windows: Of each layer the latest tokens that it attends to, a token's own included; None: to all.

    Raises:
        ValueError: The model is of another kind, or a Granite with multipliers beside that of attention.
    """

    def __init__(self, model: PreTrainedModel, image: Image | None = None) -> None:
        self._image = image
        config: Any = model.config.get_text_config()
        if config.model_type not in KNOWN or getattr(config, "use_sliding_window", False):
            raise ValueError(f"the dense oracle knows {', '.join(KNOWN)}, not {config.model_type!r}")
        if {getattr(config, name, 1.0) for name in MULTIPLIERS} != {1.0}:
            raise ValueError(f"the dense oracle multiplies by none of {', '.join(MULTIPLIERS)}")
        whole: Any = model
        self._decoder: Any = getattr(whole.model, "language_model", whole.model)
        self._lm_head: Any = whole.lm_head
        kinds = config.layer_types if config.model_type in _SLIDING else ()
        self.windows: tuple[int | None, ...] = (
            tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)
            or (None,) * config.num_hidden_layers
        )
        self._is_post_norm = config.model_type == "olmo3"
        self._rotates_by_kind = "full_attention" in (config.rope_parameters or {})
        self.num_kv_heads: int = config.num_key_value_heads
        # A Granite's configuration has none.
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.logit_scale: float = self._decoder.layers[0].self_attn.scaling

    def new_caches(self, capacity: int, window: int, fp8: Fp8 | None = None) -> list[LayerCache]:
        """Return one empty cache per layer."""

        def rounding(layer: int) -> Any:
            if fp8 is None:
                return None
            k_scale, v_scale = fp8.scales[layer]
            return lambda keys, values: (fp8.rounded(keys, k_scale), fp8.rounded(values, v_scale))

        layers = range(len(self.windows))
        return [LayerCache(self.num_kv_heads, self.head_dim, capacity, window, rounding(layer)) for layer in layers]

    def forward(self, token_ids: list[int], first_position: int, caches: list[LayerCache]) -> torch.Tensor:
        """Feed tokens at consecutive logical positions and return the logits after the last, ``[vocab_size]``, fp32.

        The caches are empty: full causal attention, and no query is remembered. Appends to the caches.
        """
        if caches[0].length:
            raise ValueError(f"the caches hold {caches[0].length} tokens: feed one by one, or clear them")
        hidden, _ = self._forward_layers(token_ids, first_position, caches)
        return self._logits(hidden[-1:])[0]

    def continued(self, token_ids: list[int], first_position: int, caches: list[LayerCache]) -> torch.Tensor:
        """Do the same behind what the caches hold, which every token sees."""
        hidden, _ = self._forward_layers(token_ids, first_position, caches)
        return self._logits(hidden[-1:])[0]

    def _forward_layers(
        self, token_ids: list[int], first_position: int, caches: list[LayerCache]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the last layer's output ``[n, hidden_size]`` and each layer's queries ``[num_qo_heads, n, head_dim]``.

        Every token sees all resident ones and those fed before it. Appends to the caches.
        """
        num_tokens, num_resident = len(token_ids), caches[0].length
        decoder = self._decoder
        hidden = decoder.embed_tokens(torch.tensor(token_ids))
        positions = torch.arange(first_position, first_position + num_tokens)
        if self._image is not None:
            hidden = self._image.put(hidden, positions)
        cos, sin = self._rotation(hidden, positions)
        all_queries = []
        for layer, layer_cache, window in zip(decoder.layers, caches, self.windows, strict=True):
            attention = layer.self_attn
            normed = hidden if self._is_post_norm else layer.input_layernorm(hidden)
            queries = self._heads(attention.q_proj(normed), getattr(attention, "q_norm", None))
            keys = self._heads(attention.k_proj(normed), getattr(attention, "k_norm", None))
            values = self._heads(attention.v_proj(normed), None)
            queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin, unsqueeze_dim=0)
            layer_cache.append(keys, values, positions)
            all_queries.append(queries)
            visible = None
            if num_tokens > 1 and (num_resident or window is not None):
                visible = torch.ones(num_tokens, num_resident + num_tokens, dtype=torch.bool).tril(num_resident)
            if window is not None:
                # Such a layer holds its latest tokens in every head, so the first head's positions are those of all.
                is_near = layer_cache.positions[0] > positions[:, None] - window
                visible = is_near if visible is None else visible & is_near
            attended = attend(
                *(queries, layer_cache.keys, layer_cache.values),
                visible,
                scale=self.logit_scale,
                sinks=getattr(attention, "sinks", None),
            )
            output = attention.o_proj(attended.transpose(0, 1).reshape(num_tokens, -1))
            if self._is_post_norm:
                hidden = hidden + layer.post_attention_layernorm(output)
                hidden = hidden + layer.post_feedforward_layernorm(layer.mlp(hidden))
            else:
                hidden = hidden + output
                # Of a batch of one: experts take no less.
                fed = layer.mlp(layer.post_attention_layernorm(hidden).unsqueeze(0))
                # Those of gpt-oss say how they were chosen, too.
                hidden = hidden + (fed[0] if isinstance(fed, tuple) else fed)[0]
        return hidden, all_queries

    def _rotation(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, ``[n, head_dim]``; all layers of a tiny model turn alike."""
        turning = positions if self._image is None else self._image.positions_of(positions)
        arguments = [hidden.unsqueeze(0), turning.unsqueeze(-2)]
        kind = ("full_attention",) if self._rotates_by_kind else ()
        cos, sin = (table.flatten(0, -3)[0] for table in self._decoder.rotary_emb(*arguments, *kind))
        if 2 * cos.shape[-1] == self.head_dim:
            # That of gpt-oss gives those of one half: the other half's are the same.
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        return cos, sin

    def _heads(self, projected: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
        """``[n, num_heads * head_dim]`` to ``[num_heads, n, head_dim]``, normed together or each for itself."""
        if norm is not None and self._is_post_norm:
            projected, norm = norm(projected), None
        heads = projected.view(projected.shape[0], -1, self.head_dim)
        return (heads if norm is None else norm(heads)).transpose(0, 1)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._lm_head(self._decoder.norm(hidden))
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: on a busy machine, waiting for the others costs five to ten times the work itself."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
