"""Faults in lengths: when a request is due, what a compaction frees, and what is reserved."""

from tests.fuzz.faults.mutant import Mutant

_LENGTHS, _PLAN, _STAGGER = "sizes/lengths.py", "sizes/compaction_plan.py", "sizes/stagger.py"
_LENGTHS_AND_PLAN = ("tests/sizes/test_lengths_and_plan.py",)
_HEAD_STARTS = ("tests/sizes/test_stagger.py",)

LENGTHS = (
    Mutant(
        "the logical length is one too long",
        _LENGTHS,
        "return resident_len + self.evicted_tokens + self.prefix_gap\n",
        "return resident_len + self.evicted_tokens + self.prefix_gap + 1\n",
        ("tests/e2e/test_policies.py", "-k", "random-qwen3"),
    ),
    Mutant(
        "a page is freed that still holds kept tokens",
        _PLAN,
        "freed_start = ceil_to_page(kept_len, page_size)",
        "freed_start = kept_len // page_size * page_size",
        _LENGTHS_AND_PLAN,
    ),
    Mutant(
        "a page is never freed",
        _PLAN,
        "freed_start = ceil_to_page(kept_len, page_size)",
        "freed_start = ceil_to_page(kept_len, page_size) + page_size",
        _LENGTHS_AND_PLAN,
    ),
    Mutant(
        "a recomputed request is compacted without its window of queries",
        _LENGTHS,
        "config.window - decode_steps, 0)",
        "0)",
        _LENGTHS_AND_PLAN,
    ),
    Mutant(
        "compaction comes one token late",
        _LENGTHS,
        "return max(config.capacity - head_start - (resident_len - prompt_len)",
        "return max(config.capacity + 1 - head_start - (resident_len - prompt_len)",
        _LENGTHS_AND_PLAN,
    ),
    Mutant(
        "a request is compacted after its last decode step",
        _LENGTHS,
        "return state.generated_len(resident_len) + 1 < state.max_new_tokens",
        "return state.generated_len(resident_len) < state.max_new_tokens",
        _LENGTHS_AND_PLAN,
    ),
    Mutant(
        "the lengths of the batch on the device are not shortened",
        "cache/step_tensors.py",
        "return seq_lens - on_device, seq_lens_cpu - torch",
        "return seq_lens, seq_lens_cpu - torch",
        ("tests/cache/test_step_tensors.py",),
    ),
    Mutant(
        "the head start is of other tokens",
        "sizes/stagger.py",
        "ids.extend(output_ids[:NUM_HASHED_OUTPUTS])",
        "ids.extend(output_ids[1:NUM_HASHED_OUTPUTS])",
        ("tests/sizes/test_stagger.py",),
    ),
    Mutant(
        "a head start may be the whole buffer",
        _STAGGER,
        "min(config.buffer - 1, config.capacity",
        "min(config.buffer, config.capacity",
        _HEAD_STARTS,
    ),
    Mutant(
        "a head start of less than a block",
        _STAGGER,
        "% (most // config.block + 1) * config.block",
        "% (most + 1)",
        ("tests/e2e/test_drop.py", "-k", "head_starts"),
    ),
    Mutant(
        "a head start comes with every compaction",
        "integration/runtime/requests.py",
        "if not config.stagger or state.evicted_generated_tokens > 0:",
        "if not config.stagger:",
        ("tests/e2e/test_stagger.py", "-k", "full_pool or crowd"),
    ),
    Mutant(
        "admission reserves a token too little",
        "sizes/reservation.py",
        "return min(tokens_left, steps_until_due(",
        "return -1 + min(tokens_left, steps_until_due(",
        ("tests/sizes/test_reservation.py",),
    ),
)
