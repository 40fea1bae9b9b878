"""Resident and logical lengths of a request, and when it is due: the one owner of that distinction.

*Resident* is what attention reads: slots held. *Logical* is every token ever seen: what RoPE and sampling count by.
They differ by the tokens evicted since the last prefill, and by what a named prefix lacks of its document.
"""

import math
from dataclasses import dataclass
from typing import Any

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.compaction_plan import CompactionPlan
from rkv_sglang.sizes.prompt_plan import PromptPlan

NEVER = math.inf


@dataclass(slots=True)
class RequestState:
    """Memory that the policy keeps of one request. Nothing else changes its logical length.

    Attributes:
        prompt_len: Tokens of the prompt.
        max_new_tokens: Most tokens the request may generate.
        prefix_gap: Tokens by which the named prefix that the request goes on from counts more than its slots.
        pool_size: What the pool had for the request and others when it was admitted; None before.
        evicted_tokens: Tokens evicted since the last prefill, those of the prompt among them.
        evicted_prompt_tokens: Those of the prompt.
        compactions: Compactions over the whole life of the request.
        evicted_in_all: Tokens evicted over the whole life; those computed again after a retraction may count twice.
        discarded_compactions: Compactions of an answer that was discarded, which it no longer counts.
        next_check: Forward count before which the request needs no look; ``NEVER`` if it can never be due.
        head_start: How early its first compaction comes, in tokens; None until its tokens have decided.
        kept_state: What a stateful policy is given back at the next compaction; a tensor that is only carried here.
        memory: The same of what a policy remembers besides its tokens.
        observed: The same of what a policy observes for all layers alike.
        prompt_hits: What a long prompt finds within itself, for a policy that keeps it; only carried here.
        host_copy: The resident KV of a request that waits to be restored from it, a ``HostCopy``; only carried here.
    """

    prompt_len: int
    max_new_tokens: int
    prefix_gap: int = 0
    pool_size: int | None = None
    evicted_tokens: int = 0
    evicted_prompt_tokens: int = 0
    compactions: int = 0
    evicted_in_all: int = 0
    discarded_compactions: int = 0
    next_check: float = 0
    head_start: int | None = None
    kept_state: Any = None
    memory: Any = None
    observed: Any = None
    prompt_hits: Any = None
    host_copy: Any = None

    @property
    def held_prompt_len(self) -> int:
        """Prompt tokens that attention sees: the first of those held; all of them before any prefill."""
        return self.prompt_len - self.evicted_prompt_tokens

    @property
    def evicted_generated_tokens(self) -> int:
        """Generated tokens evicted since the last prefill."""
        return self.evicted_tokens - self.evicted_prompt_tokens

    def generated_len(self, resident_len: int) -> int:
        """Return how many generated tokens have had their KV written since the last prefill, kept or not."""
        return resident_len - self.prompt_len + self.evicted_tokens

    def logical_len(self, resident_len: int) -> int:
        """Return the length that RoPE positions count by."""
        return resident_len + self.evicted_tokens + self.prefix_gap

    def record(self, plan: CompactionPlan | PromptPlan) -> None:
        """Count one compaction: its evicted tokens stay part of the logical length, on which RoPE depends."""
        self.compactions += 1
        self.evicted_tokens += plan.evicted_tokens
        self.evicted_in_all += plan.evicted_tokens
        if isinstance(plan, PromptPlan):
            self.evicted_prompt_tokens += plan.evicted_tokens

    def forget_cache(self) -> None:
        """Return to the state before any prefill, as after a retraction: nothing is resident, so nothing is evicted."""
        self.evicted_tokens = self.evicted_prompt_tokens = 0
        self.pool_size = None
        self.next_check = 0
        self.drop_tensors()

    def forget_answer(self) -> None:
        """Return to the state before anything was generated, as where a retraction discards what was."""
        self.forget_cache()
        self.discarded_compactions += self.compactions
        self.compactions = self.evicted_in_all = 0
        self.head_start = None

    def drop_tensors(self) -> None:
        """Let go of the memory that a request needs to go on; the engine may keep a finished one for long."""
        self.kept_state = self.memory = self.observed = self.prompt_hits = None
        self.host_copy = None


def can_ever_compact(config: PolicyConfig, max_new_tokens: int) -> bool:
    """Return whether a request of that many tokens can reach a compaction.

    The last token generated is never fed back, so ``max_new_tokens`` tokens take ``max_new_tokens - 1`` decode steps,
    and a compaction needs one more step after ``capacity`` of them. One that cannot outgrow its capacity is left whole,
    whatever its head start.
    """
    return max_new_tokens - 1 > config.capacity


def decodes_again(state: RequestState, resident_len: int) -> bool:
    """Return whether another decode step will follow, as far as the length limit tells.

    Counts the token in flight, so it says the same with and without overlap scheduling.
    """
    return state.generated_len(resident_len) + 1 < state.max_new_tokens


def steps_until_due(
    config: PolicyConfig, prompt_len: int, resident_len: int, decode_steps: int, head_start: int = 0
) -> int:
    """Return after how many more decode steps the request must be compacted; 0 means before the next one.

    Due is a request with ``capacity - head_start`` generated tokens resident that has seen ``window`` decode queries
    since its last prefill.

    Args:
        prompt_len: Tokens of the prompt that are held.
        resident_len: Slots the request holds, in tokens, prompt included.
        decode_steps: Decode steps since the last prefill.
        head_start: How early the compaction comes, in tokens; for the first one since the last prefill only.
    """
    return max(config.capacity - head_start - (resident_len - prompt_len), config.window - decode_steps, 0)
