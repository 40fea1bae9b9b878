"""Queries of those who judge a document, seen layer by layer while its request is prefilled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rkv_sglang.algorithm.document_attention import add_attention
from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.step_tensors import read_slots
from rkv_sglang.policies import GivenScores, Policy


class Pool(Protocol):
    """The KV pool, and how the model attends to it; see ``parts.Scored``."""

    @property
    def buffers(self) -> KVBuffers:
        """All layers of this rank."""

    @property
    def attention(self) -> ModelAttention:
        """How logits are made."""

    def follow_scales(self) -> None:
        """Bring the factors of an fp8 pool up to date."""


@dataclass(frozen=True)
class Verdict:
    """By what the tokens of a document are chosen.

    Attributes:
        policy: Scores them, or stands for scores that are there.
        resident_len: Tokens of the prompt that take part in the scores.
        queries: For the policy, of all layers, ``[num_layers, window, num_qo_heads, head_dim]``; of no heads where it
            looks at none.
    """

    policy: Policy
    resident_len: int
    queries: Tensor

    def read_queries(self, part: slice, layers: slice) -> Tensor:
        """Return those of some layers as ``compact_requests`` wants them, of the one request that there is."""
        return self.queries[layers, None]


class Judging(ABC):
    """The queries of some tokens in a row at the end of a prompt, of which every layer shows some at a time.

    Args:
        first: Place of the first of them in the prompt.
        input_len: Tokens of the prompt.
        num_layers: Of this rank.
    """

    def __init__(self, first: int, input_len: int, num_layers: int) -> None:
        self.first = first
        self.input_len = input_len
        self._num_judged = [0] * num_layers

    @property
    def is_complete(self) -> bool:
        """Whether all of them have judged, in every layer."""
        return all(number == self.input_len - self.first for number in self._num_judged)

    @property
    def num_layers(self) -> int:
        """Layers of this rank."""
        return len(self._num_judged)

    def see(self, layer: int, queries: Tensor, place: int) -> None:
        """Take one layer's queries of a forward pass, after RoPE; call it for every layer, in order.

        Args:
            layer: Of this rank, from 0.
            queries: Of consecutive tokens of the prompt, ``[n, num_qo_heads, head_dim]``.
            place: Of the first of them in the prompt.
        """
        if place <= self.first:
            # Also where all is computed again.
            self._num_judged[layer] = 0
        own = queries[max(self.first - place, 0) : max(self.input_len - place, 0)]
        if len(own) > 0:
            self._take(layer, own, max(place, self.first))

    def finish(self) -> None:
        """Note that the prompt is prefilled; call it where forward passes run, while the request has its slots."""
        return

    @abstractmethod
    def verdict(self, policy: Policy, window: int) -> Verdict:
        """Return what chooses, once all is complete.

        Args:
            policy: The server's.
            window: Queries by which it scores.
        """

    @abstractmethod
    def _take(self, layer: int, queries: Tensor, place: int) -> None:
        """Let tokens judge, at least one."""


class LastQueries(Judging):
    """Queries of the last tokens of a task, by which the server's policy judges the document; as for ``Judging``."""

    def __init__(self, first: int, input_len: int, num_layers: int) -> None:
        super().__init__(first, input_len, num_layers)
        self._queries: Tensor | None = None

    def verdict(self, policy: Policy, window: int) -> Verdict:
        assert self._queries is not None and self._queries.shape[1] == window
        return Verdict(policy, self.input_len, self._queries)

    def _take(self, layer: int, queries: Tensor, place: int) -> None:
        if self._queries is None:
            self._queries = queries.new_empty(self.num_layers, self.input_len - self.first, *queries.shape[1:])
        start = place - self.first
        self._queries[layer, start : start + len(queries)] = queries
        self._num_judged[layer] += len(queries)


class Places(Judging):
    """Nobody judges, for the server's policy looks at places alone.

    Args:
        input_len: Tokens of the prompt.
    """

    def __init__(self, input_len: int) -> None:
        super().__init__(input_len, input_len, num_layers=0)

    def verdict(self, policy: Policy, window: int) -> Verdict:
        return Verdict(policy, self.input_len, torch.empty(0, window, 0, 0))

    def _take(self, layer: int, queries: Tensor, place: int) -> None:
        return


class DocumentAttention(Judging):
    """The attention that the document receives, from all of a task or from a repeat of the document.

    A layer's keys are in the pool once it has attended, which the next layer's queries tell: those of one layer wait
    meanwhile.

    Args:
        judge: As in ``add_attention``.
        length: Tokens of the document.
        first, input_len: As for ``Judging``.
        pool: Where the keys are.
        req_to_token: The index map.
        req: The request of the prompt.
    """

    def __init__(
        self, judge: str, length: int, first: int, input_len: int, pool: Pool, req_to_token: Tensor, req: Any
    ) -> None:
        super().__init__(first, input_len, pool.buffers.keys.num_layers)
        self._judge = judge
        self._pool = pool
        self._req_to_token = req_to_token
        self._req = req
        self._shape = (self.num_layers, pool.buffers.keys.num_kv_heads, length)
        self._scores: Tensor | None = None
        self._slots: Tensor | None = None
        # Layer, queries, and the place of the first.
        self._waiting: tuple[int, Tensor, int] | None = None

    def see(self, layer: int, queries: Tensor, place: int) -> None:
        if layer == 0:
            self._begin(place, place + len(queries))
        self._judge_waiting()
        super().see(layer, queries, place)

    def finish(self) -> None:
        self._forget_other(self.input_len)
        # By the slots that its pass read: the row may be another request's before a copy of it is read here.
        self._judge_waiting()

    def verdict(self, policy: Policy, window: int) -> Verdict:
        assert self._scores is not None
        nothing = self._scores.new_empty(self.num_layers, window, 0, 0)
        scores = GivenScores(self._scores, self._pool.buffers.keys.first_layer)
        return Verdict(scores, self._shape[2], nothing)

    def _begin(self, place: int, end: int) -> None:
        """Prepare for the tokens from ``place`` to ``end``; what waits goes on only if it comes right before them."""
        self._forget_other(place)
        if end > self.first:
            self._pool.follow_scales()
            # Anew in each pass: the radix tree may have put others of the same content in their place.
            self._slots = read_slots(self._req_to_token, [self._req.kv.req_pool_idx], [end])[0]

    def _forget_other(self, place: int) -> None:
        """Forget what waits unless it comes right before that place."""
        if self._waiting is not None and self._waiting[2] + len(self._waiting[1]) != place:
            self._waiting = None

    def _take(self, layer: int, queries: Tensor, place: int) -> None:
        # A copy: the tensor is the model's, and of all requests of the batch.
        self._waiting = (layer, queries.clone(), place)

    def _judge_waiting(self) -> None:
        if self._waiting is None:
            return
        (layer, queries, place), self._waiting = self._waiting, None
        slots, buffers = self._slots, self._pool.buffers
        assert slots is not None
        if self._scores is None:
            self._scores = torch.zeros(self._shape, dtype=torch.float32, device=queries.device)
        if self._num_judged[layer] == 0:
            self._scores[layer] = 0.0
        add_attention(
            self._scores[layer],
            self._judge,
            queries,
            place,
            self.input_len,
            lambda head, places: buffers.keys_of_head(layer, head, slots[places]),
            self._pool.attention,
        )
        self._num_judged[layer] += len(queries)
