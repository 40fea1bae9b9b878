"""Integer plans of what one compaction does to a request's slots: every rank computes the same one without talking."""

from dataclasses import dataclass

from rkv_sglang.sizes.pages import ceil_to_page

# Fewest tokens that a drop takes together; page sizes that divide it all give the same blocks.
LEAST_BLOCK = 16


@dataclass(frozen=True)
class CompactionPlan:
    """Lengths of a request before and after a compaction.

    Attributes:
        prompt_len: ``[0, prompt_len)`` is read for scoring and never written.
        resident_len: Tokens held before; ``[prompt_len, resident_len)`` are the generated ones.
        kept_len: Tokens held after.
    """

    prompt_len: int
    resident_len: int
    kept_len: int

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
        """Tokens that lose their KV, in every layer and head."""
        return self.resident_len - self.kept_len


@dataclass(frozen=True)
class GatherPlan(CompactionPlan):
    """What every layer and head keeps is moved to the front: request-relative positions, half-open ranges.

    Attributes:
        freed_start: First position of the first whole page that holds nothing any more; what is kept is packed, in
            temporal order, into ``[prompt_len, kept_len)``.
        freed_end: Equal to ``resident_len``; ``freed_start >= freed_end`` if no page becomes free.
    """

    freed_start: int
    freed_end: int


@dataclass(frozen=True)
class DropPlan(CompactionPlan):
    """Whole blocks leave the request's row of the index map, and nothing is moved.

    Block ``b`` is the row's positions ``[b * block, (b + 1) * block)``.

    Attributes:
        block: Tokens of a block, a multiple of the page size.
        first_block: First block that may go: it holds no token of the prompt.
        end_block: Past the last one that may go: from its start on, there are the window and less than a block more.
    """

    block: int
    first_block: int
    end_block: int

    @property
    def num_droppable(self) -> int:
        """Blocks that may go."""
        return self.end_block - self.first_block

    @property
    def num_dropped(self) -> int:
        """Blocks that go."""
        return self.evicted_tokens // self.block

    @property
    def num_kept(self) -> int:
        """Blocks of those that may go which stay."""
        return self.num_droppable - self.num_dropped


def plan_compaction(*, prompt_len: int, resident_len: int, budget: int, page_size: int) -> GatherPlan:
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
    return GatherPlan(prompt_len, resident_len, kept_len, freed_start, resident_len)


def block_of_pages(page_size: int) -> int:
    """Return the tokens that a drop takes together: 16 or more, whole pages."""
    return ceil_to_page(LEAST_BLOCK, page_size)


def plan_drop(*, prompt_len: int, resident_len: int, budget: int, window: int, block: int) -> DropPlan:
    """Plan to drop as many whole blocks as leave ``budget`` generated tokens or up to a block more.

    Exactly ``budget`` stay where a multiple of the block is above it, as when a request first reaches its capacity.

    Raises:
        ValueError: Less than a block is above the budget, or the window leaves too few blocks to choose from.
    """
    kept_len = resident_len - (resident_len - prompt_len - budget) // block * block
    first_block, end_block = -(-prompt_len // block), (resident_len - window) // block
    plan = DropPlan(prompt_len, resident_len, kept_len, block, first_block, end_block)
    if not 0 < plan.num_dropped <= plan.num_droppable:
        raise ValueError(
            f"no block of {block} can be dropped: {plan.generated_len} generated tokens are resident, the budget is "
            f"{budget}, the window {window}"
        )
    return plan
