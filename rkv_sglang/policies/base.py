"""Interface of a policy: its inputs, its scores, and what it is given back at the next compaction."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.config import HEAD

# Above the index of every token, and in fp32 still exact with one added.
CHOSEN = 2.0**23


@dataclass(frozen=True)
class ScoreInputs:
    """The resident tokens of one request in one layer, in temporal order.

    Attributes:
        queries: Post-RoPE queries of the last ``window`` tokens, oldest first,
            ``[window, num_qo_heads, head_dim]``, floating.
        keys: Keys as cached, ``[L, num_kv_heads, head_dim]``, floating, on the device of ``queries``.
        prompt_len: Tokens of the prompt; they take part in the scores but are no candidates.
        values: Values as cached, ``[L, num_kv_heads, v_head_dim]``, floating; ``None`` unless the policy needs them.
        logical_len: Tokens ever seen, evicted ones included; ``None`` means L, so nothing was evicted.
        layer: Number of the layer in the whole model.
        first_kv_head: Number of the first KV head in the whole model; the others follow it.
        state: For a stateful policy, the scores (or ``Scored.state``) that it gave at the last compaction to the tokens
            that are still here, ``[num_kv_heads, num_scored]``, fp32: column i belongs to the resident token
            ``prompt_len + i``. Later tokens have never been scored, and their logical positions end at
            ``logical_len - 1`` without a gap. ``None`` before the first compaction and after the cache was computed
            anew.
        memory: For a policy that remembers, the ``Scored.memory`` that it returned at the last compaction in this
            layer; ``None`` when ``state`` would be.
        observed: For a policy that observes, what ``observe`` returned: to ``score`` at this compaction, to ``observe``
            itself at the last one; ``None`` when ``state`` would be, and where nothing is observed.
        budget: Generated tokens that will be kept, the window included; ``None`` where nobody says.
        model: How the model attends; ``model.logits`` makes attention logits of products of queries and keys.
        prompt_hits: Of this layer, for a policy that keeps them: what the prompt finds within the prompt. Written
            unless it is filled. ``None`` for a short prompt, or where there is no room: then it is found anew.

    Raises:
        ValueError: The lengths do not fit together.
    """

    queries: Tensor
    keys: Tensor
    prompt_len: int
    values: Tensor | None = None
    logical_len: int | None = None
    state: Tensor | None = None
    prompt_hits: PromptHits | None = None
    layer: int = 0
    first_kv_head: int = 0
    memory: Tensor | None = None
    observed: Tensor | None = None
    budget: int | None = None
    model: ModelAttention = PLAIN_ATTENTION

    def __post_init__(self) -> None:
        window, num_tokens = self.queries.shape[0], self.keys.shape[0]
        if self.prompt_len < 0 or self.prompt_len + window > num_tokens:
            raise ValueError(
                f"prompt_len {self.prompt_len} and a window of {window} queries do not fit into L = {num_tokens} keys"
            )
        if self.values is not None and self.values.shape[:2] != self.keys.shape[:2]:
            raise ValueError(f"values {list(self.values.shape)} do not belong to keys {list(self.keys.shape)}")
        if self.logical_len is not None and self.logical_len < num_tokens:
            raise ValueError(f"logical_len {self.logical_len} is less than the L = {num_tokens} resident tokens")
        if self.state is not None:
            num_candidates = num_tokens - window - self.prompt_len
            if self.state.dim() != 2 or len(self.state) != self.keys.shape[1] or self.num_scored > num_candidates:
                raise ValueError(
                    f"state {list(self.state.shape)} must be [{self.keys.shape[1]}, at most {num_candidates}]: one "
                    "row a KV head, one column a candidate that was scored before"
                )

    @property
    def num_scored(self) -> int:
        """How many of the oldest candidates were scored at the last compaction."""
        return 0 if self.state is None else self.state.shape[1]

    @property
    def evicted_tokens(self) -> int:
        """Tokens seen that are no longer resident."""
        return 0 if self.logical_len is None else self.logical_len - self.keys.shape[0]


@dataclass(frozen=True)
class Scored:
    """What a policy returns whose state is not its scores.

    Attributes:
        scores: As ``Policy.score`` returns them alone, fp32 or bool.
        state: What travels with the tokens in their place, of the shape of ``scores``, fp32: of those that are kept it
            is the next ``ScoreInputs.state``.
        memory: What travels with the request whatever is kept, ``[num_kv_heads, ...]``: the next
            ``ScoreInputs.memory``.
    """

    scores: Tensor
    state: Tensor
    memory: Tensor | None = None


@dataclass(frozen=True)
class Places:
    """Where tokens of one or more requests lie: all that a policy needs which looks at nothing else.

    Attributes:
        indices: Index of each among the resident tokens of its request, ``[num_tokens]``, int64.
        kv_lens: Resident tokens of its request, the same shape.
        logical_lens: Tokens ever seen of its request, the same shape.
    """

    indices: Tensor
    kv_lens: Tensor
    logical_lens: Tensor


class Policy(Protocol):
    """A rule that scores the tokens of one request, layer by layer.

    A policy is a dataclass whose fields are its parameters; it refuses bad ones in ``__post_init__``. It may set class
    attributes: ``needs_values = True`` to be given values; ``needs_rope = True`` to be given ``model.rope``,
    ``needs_statistics = True`` to be given ``model.statistics``, too; ``stateful = True`` to be given back, at the next
    compaction, the scores of the tokens that were kept (see ``needs_values`` and ``is_stateful``); ``remembers = True``
    to be given back ``Scored.memory``, of which a method ``memory_numbers(gqa_group_size, head_dim)`` says how many
    numbers it has at the most for each KV head; ``keeps_prompt_hits = True`` to be given ``prompt_hits`` of long
    prompts; ``default_window`` and ``default_buffer``, tokens, for servers on which nobody sets them;
    ``granularities``, where its choice can be made, the default first (``("head",)`` where it sets none).

    One that decides something for all layers and heads alike before any is scored has a method ``observe(layers)``. It
    is called once at each compaction, with an iterator over the ``ScoreInputs`` of the layers whose numbers in the
    model ``observed_layers(layers)`` picks from those that attend to everything, in that order, without values or
    state; who lets each go before the next holds the keys of one at a time. It returns a tensor that depends on nothing
    but these; ``score`` is given it as ``observed`` in every layer, and so is ``observe`` at the next compaction.
    ``observed_numbers(budget, window)`` says how many numbers it has at the most. A compaction of prompts observes
    nothing (see ``observes``).

    One whose scores depend on nothing but the places of tokens has a method ``score_places(places)`` too, which returns
    the scores of tokens with one choice for a whole request, ``[num_tokens]``, fp32 (see ``is_blind``).
    """

    def score(self, inputs: ScoreInputs) -> Tensor | Scored:
        """Score the tokens before the window; reads ``inputs`` only.

        Returns:
            ``[num_kv_heads, L - window]``, fp32, no NaN; higher means keep. Columns of the prompt are ignored. A policy
            that chooses instead of ranking returns bool of that shape, true for what stays: what is missing to the
            budget is filled up with the newest of the others, and where there is no room for all, the newest chosen
            stay. A stateful policy that wants other numbers back than its scores returns both, a ``Scored``.

        Raises:
            ValueError: A shape, dtype or device of ``inputs`` does not fit.
        """
        ...


@dataclass(frozen=True)
class GivenScores:
    """Stands in the place of a policy where the scores of one request are there already.

    Attributes:
        scores: Of all its tokens, those of the window too, ``[num_layers, num_kv_heads, L]``, fp32.
        first_layer: Number in the whole model of the first of these layers.
    """

    scores: Tensor
    first_layer: int = 0

    def score(self, inputs: ScoreInputs) -> Tensor:
        """Return those of a layer as ``Policy.score`` does; nothing but lengths is looked at."""
        num_scored = len(inputs.keys) - len(inputs.queries)
        return self.scores[inputs.layer - self.first_layer, :, :num_scored]


def as_scored(result: Tensor | Scored) -> Scored:
    """Return what ``Policy.score`` returned, with the state that it means, and a choice as scores that lead to it."""
    scored = result if isinstance(result, Scored) else Scored(result, result)
    if scored.scores.dtype != torch.bool:
        return scored
    scores = by_choice(scored.scores)
    return replace(scored, scores=scores, state=scores if scored.state.dtype == torch.bool else scored.state)


def by_choice(chosen: Tensor) -> Tensor:
    """Return scores of which the best are those chosen, the newest first, and then the others, the newest first.

    Args:
        chosen: ``[..., L - window]``, bool.

    Returns:
        The same shape, fp32; exact up to 2^23 tokens.
    """
    return chosen * CHOSEN + torch.arange(chosen.shape[-1], device=chosen.device)


def needs_values(policy: Policy) -> bool:
    """Return whether ``ScoreInputs.values`` must be filled for this policy."""
    return bool(getattr(policy, "needs_values", False))


def needs_statistics(policy: Policy) -> bool:
    """Return whether ``ScoreInputs.model`` must have statistics of the model's queries, and its rotary positions."""
    return bool(getattr(policy, "needs_statistics", False))


def needs_rope(policy: Policy) -> bool:
    """Return whether ``ScoreInputs.model`` must have the model's rotary positions."""
    return bool(getattr(policy, "needs_rope", False)) or needs_statistics(policy)


def memory_numbers(policy: Policy, gqa_group_size: int, head_dim: int) -> int:
    """Return how many numbers, of the type of queries, the policy remembers of a request in each layer and KV head."""
    if not getattr(policy, "remembers", False):
        return 0
    return int(policy.memory_numbers(gqa_group_size, head_dim))  # type: ignore[attr-defined]


def observes(policy: Policy | type[Any]) -> bool:
    """Return whether something is decided for all layers alike before any is scored."""
    return hasattr(policy, "observe")


def observed_numbers(policy: Policy, budget: int, window: int) -> int:
    """Return how many numbers the policy observes of a request, at the most."""
    return int(policy.observed_numbers(budget, window)) if observes(policy) else 0  # type: ignore[attr-defined]


def is_stateful(policy: Policy) -> bool:
    """Return whether the scores of kept tokens must come back as ``ScoreInputs.state``."""
    return bool(getattr(policy, "stateful", False))


def keeps_prompt_hits(policy: Policy) -> bool:
    """Return whether ``ScoreInputs.prompt_hits`` of a long prompt must be kept between compactions."""
    return bool(getattr(policy, "keeps_prompt_hits", False))


def granularities_of(policy: Policy | type[Any]) -> tuple[str, ...]:
    """Return where the policy's choice can be made, the default first."""
    return tuple(getattr(policy, "granularities", (HEAD,)))


def is_blind(policy: Policy | type[Any]) -> bool:
    """Return whether one choice for a whole request needs no queries, keys or values."""
    return hasattr(policy, "score_places")
