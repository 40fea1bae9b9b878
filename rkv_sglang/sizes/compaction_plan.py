"""Integer plan of what one compaction does to a request's slots."""

from dataclasses import dataclass

from rkv_sglang.sizes.pages import ceil_to_page


@dataclass(frozen=True)
class CompactionPlan:
    """Request-relative positions, half-open ranges. Every rank computes the same plan without talking.

    Attributes:
        prompt_len: ``[0, prompt_len)`` is read for scoring and never written.
        resident_len: Tokens held before; ``[prompt_len, resident_len)`` are the generated ones.
        kept_len: Tokens held after; kept entries are packed, in temporal order, into ``[prompt_len, kept_len)``.
        freed_start: First position of the first whole page that holds nothing any more.
        freed_end: Equal to ``resident_len``; ``freed_start >= freed_end`` if no page becomes free.
    """

    prompt_len: int
    resident_len: int
    kept_len: int
    freed_start: int
    freed_end: int

    @property
    def budget(self) -> int:
        """Generated tokens that stay."""
        return self.kept_len - self.prompt_len

    @property
    def generated_len(self) -> int:
        """Generated tokens held before."""
        return self.resident_len - self.prompt_len

    @property
    def evicted_tokens(self) -> int:
        """Tokens that lose their KV, in every layer and head (which ones differs by layer and head)."""
        return self.resident_len - self.kept_len


def plan_compaction(*, prompt_len: int, resident_len: int, budget: int, page_size: int) -> CompactionPlan:
    """Plan to keep ``budget`` generated tokens.

    Raises:
        ValueError: Fewer than ``budget + 1`` generated tokens are resident, so there is nothing to evict.
    """
    if resident_len - prompt_len <= budget:
        raise ValueError(
            f"nothing to evict: {resident_len - prompt_len} generated tokens are resident and the budget is {budget}"
        )
    kept_len = prompt_len + budget
    freed_start = ceil_to_page(kept_len, page_size)
    return CompactionPlan(prompt_len, resident_len, kept_len, freed_start, resident_len)
