"""Integer plan of a prompt's compaction, which copies what stays of a request into slots of its own."""

from dataclasses import dataclass

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.compaction_plan import CompactionPlan


@dataclass(frozen=True)
class PromptPlan:
    """Lengths of a request before and after its prompt is compacted; what it has generated stays whole.

    Attributes:
        prompt_len: Tokens of the prompt.
        resident_len: Tokens held before, the prompt and all that was generated since the last prefill.
        budget: Prompt tokens that stay, per layer and KV head.
    """

    prompt_len: int
    resident_len: int
    budget: int

    @property
    def generated_len(self) -> int:
        """Generated tokens held, before and after."""
        return self.resident_len - self.prompt_len

    @property
    def evicted_tokens(self) -> int:
        """Prompt tokens that this request lets go, in every layer and head."""
        return self.prompt_len - self.budget

    @property
    def kept_len(self) -> int:
        """Tokens held afterwards: slots that it takes."""
        return self.resident_len - self.evicted_tokens

    @property
    def of_scores(self) -> CompactionPlan:
        """What the scores are asked for: all tokens compete, as generated ones do elsewhere."""
        return CompactionPlan(prompt_len=0, resident_len=self.resident_len, kept_len=self.budget)


def can_compact_prompt(config: PolicyConfig, prompt_len: int, max_new_tokens: int) -> bool:
    """Return whether a prompt is longer than its budget, and its request may decode on once it was compacted."""
    return 0 < config.prompt_budget < prompt_len and max_new_tokens - 1 > config.window
