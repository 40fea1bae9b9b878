"""Counters of what the policy did in one scheduler process."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rkv_sglang.sizes.compaction_plan import CompactionPlan
from rkv_sglang.sizes.lengths import RequestState
from rkv_sglang.sizes.prompt_plan import PromptPlan


@dataclass
class PolicyStats:
    """Counters since the start of this scheduler process.

    Attributes:
        compactions: Compactions done, those of prompts among them.
        prompt_compactions: Compactions of a prompt.
        evicted_tokens: Tokens whose KV was dropped (per layer and head the same count).
        requests_compressed: Requests compacted at least once.
        requests_restored: Times that a preempted request went on from a host copy of its compacted KV.
        requests_aborted: Requests ended because, once preempted, they could neither be computed again nor restored.
        peak_private_tokens: Most generated tokens any request ever held.
        requests_answered: Requests that ended, however they did; not those of SGLang's health checks.
        answers_compressed: Those of them that were compacted at least once.
    """

    compactions: int = 0
    prompt_compactions: int = 0
    evicted_tokens: int = 0
    requests_compressed: int = 0
    requests_restored: int = 0
    requests_aborted: int = 0
    peak_private_tokens: int = 0
    requests_answered: int = 0
    answers_compressed: int = 0

    def count(self, plan: CompactionPlan | PromptPlan, state: RequestState) -> None:
        """Count one compaction that ``state`` has recorded; only read here."""
        self.compactions += 1
        self.prompt_compactions += isinstance(plan, PromptPlan)
        self.evicted_tokens += plan.evicted_tokens
        self.requests_compressed += state.compactions + state.discarded_compactions == 1
        self.peak_private_tokens = max(self.peak_private_tokens, plan.generated_len)

    def count_answer(self, state: RequestState) -> None:
        """Count a request that ended."""
        self.requests_answered += 1
        self.answers_compressed += state.compactions > 0

    def as_dict(self) -> dict[str, int]:
        """Return the counters as plain integers."""
        return asdict(self)
