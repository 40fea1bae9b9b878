"""Integer plans of what copies prompt tokens that stay: a prompt's compaction, and the making of a named prefix."""

from dataclasses import dataclass

from rkv_sglang.config import NUM_FIRST_KEPT, PolicyConfig
from rkv_sglang.sizes.compaction_plan import CompactionPlan, DropPlan


@dataclass(frozen=True)
class PromptPlan:
    """Lengths of a request before and after its prompt is compacted; what it has generated stays whole.

    Attributes:
        prompt_len: Tokens of the prompt.
        resident_len: Tokens held before, the prompt and all that was generated since the last prefill.
        budget: Prompt tokens that stay, per layer and KV head or of all of them.
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

    def of_blocks(self, window: int, block: int) -> DropPlan:
        """What the choice of blocks is asked for: of those between the first tokens and the window of the prompt."""
        return DropPlan(
            prompt_len=0,
            resident_len=self.resident_len,
            kept_len=self.resident_len - self.evicted_tokens,
            block=block,
            first_block=-(-NUM_FIRST_KEPT // block),
            end_block=(self.prompt_len - window) // block,
        )


@dataclass(frozen=True)
class PrefixPlan(PromptPlan):
    """Lengths of a named prefix: of the document ``budget`` tokens are copied, of the task behind it none."""

    @property
    def kept_len(self) -> int:
        """Slots that it takes."""
        return self.budget


def kept_of_prompt(config: PolicyConfig, prompt_len: int) -> int:
    """Return how many tokens of a prompt stay that is compacted: whole blocks go, so up to a block above the budget."""
    return prompt_len - (prompt_len - config.prompt_budget) // config.block * config.block


def can_compact_prompt(config: PolicyConfig, prompt_len: int, max_new_tokens: int) -> bool:
    """Return whether a prompt is a block longer than its budget and its request may decode on afterwards."""
    is_longer = 0 < config.prompt_budget <= prompt_len - config.block
    return is_longer and max_new_tokens - 1 > config.window
