"""Memory for what long prompts find within themselves, kept between the compactions of their requests."""

import weakref

from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.sizes.lengths import RequestState


class PromptHitsRoom:
    """Gives out ``PromptHits`` of no more prompt tokens together than were taken off the pool for them.

    What nobody holds any more is free again. Requests that share a prefix have one each, so there may be no room; such
    a request is compacted as well, only slower.

    Args:
        is_used: Whether the policy keeps any.
    """

    def __init__(self, *, is_used: bool) -> None:
        self._is_used = is_used
        self._given: weakref.WeakSet[PromptHits] = weakref.WeakSet()

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all that is held."""
        return sum(hits.prompt_len for hits in self._given)

    def hits_of(self, state: RequestState, buffers: KVBuffers, *, capacity: int, most_tokens: int) -> PromptHits | None:
        """Return those of a request that is to be compacted, allocated on the current stream at the first time.

        Args:
            state: Of the request; it carries them from then on.
            buffers: The KV pool.
            capacity: Generated tokens that it holds; the pairs of a prompt that is no longer are few beside theirs.
            most_tokens: Prompt tokens of all requests that may hold some: the slots of the pool.

        Returns:
            None if none are kept, or if there is no room.
        """
        hits: PromptHits | None = state.prompt_hits
        prompt_len = state.held_prompt_len
        if hits is not None or not self._is_used or prompt_len <= capacity:
            return hits
        if self.num_tokens + prompt_len <= most_tokens:
            keys = buffers.keys
            hits = PromptHits.empty(keys.num_layers, keys.num_kv_heads, prompt_len, keys.device)
            self._given.add(hits)
            state.prompt_hits = hits
        return hits
