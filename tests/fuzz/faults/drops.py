"""Faults in the choice of whole blocks for a request, and in its row of the map."""

from tests.fuzz.faults.mutant import Mutant

_DROP, _BLOCKS, _PLAN = "cache/drop.py", "cache/block_choice.py", "sizes/compaction_plan.py"
_RUNTIME = "integration/runtime/runtime.py"
_DROPPED = ("tests/cache/test_drop.py",)

DROPS = (
    Mutant(
        "a page is freed that a drop keeps",
        _DROP,
        "freed = slots[((dropped_start + dropped * block)[:, None]",
        "freed = slots[((dropped_start + dropped * block + block)[:, None]",
        _DROPPED,
    ),
    Mutant(
        "kept blocks are put together in the reverse order",
        _DROP,
        "targets += range(first, first + plan.num_kept * block, block)",
        "targets += reversed(range(first, first + plan.num_kept * block, block))",
        _DROPPED,
    ),
    Mutant(
        "what comes behind the blocks stays where it was",
        _DROP,
        "tail_targets += range(behind.start - plan.evicted_tokens, behind.stop - plan.evicted_tokens)",
        "tail_targets += behind",
        _DROPPED,
    ),
    Mutant(
        "a row is shortened and its length is not",
        _RUNTIME,
        "kv.kv_allocated_len = kv.kv_committed_len = job.plan.kept_len",
        "kv.kv_committed_len = job.plan.kept_len",
        ("tests/e2e/test_drop.py", "-k", "as_there_are_slots"),
    ),
    Mutant(
        "blocks are scored by the last layer alone",
        _BLOCKS,
        "totals += scores.sum(dim=(0, 1))",
        "totals += scores[-1].sum(dim=0)",
        ("tests/e2e/test_drop.py", "-k", "rkv-llama"),
    ),
    Mutant(
        "the blocks of the highest scores go",
        _BLOCKS,
        "ranks = means.argsort(dim=1, stable=True)",
        "ranks = means.argsort(dim=1, stable=True, descending=True)",
        _DROPPED,
    ),
    Mutant(
        "in fp8 the blocks of the highest scores go",
        "kernels/dispatch.py",
        "own.scores.shape[1]] = own.scores\n",
        "own.scores.shape[1]] = own.scores if keys.dtype == keys.storage_dtype else -own.scores\n",
        ("tests/e2e/test_fp8.py", "-k", "dense_cache_that_rounds"),
    ),
    Mutant(
        "each rank chooses blocks by its own heads",
        _BLOCKS,
        "if sum_over_ranks is not None:",
        "if False and sum_over_ranks is not None:",
        ("tests/e2e/test_drop.py", "-k", "two_ranks"),
    ),
    Mutant(
        "a block with the end of the prompt may go",
        _PLAN,
        "first_block, end_block = -(-prompt_len // block),",
        "first_block, end_block = prompt_len // block,",
        _DROPPED,
    ),
    Mutant(
        "a block of the window may go",
        _PLAN,
        "(resident_len - window) // block",
        "resident_len // block",
        _DROPPED,
    ),
    Mutant(
        "a query row is given up though its request is due soon",
        _RUNTIME,
        "steps_left = job.config.capacity - job.plan.budget",
        "steps_left = job.config.buffer",
        ("tests/integration/runtime/test_streams.py", "-k", "due_again"),
    ),
    Mutant(
        "a policy forgets what the blocks that stayed had scored",
        "integration/runtime/drop.py",
        "job.state.kept_state = choice.kept_state",
        "pass",
        ("tests/e2e/test_drop.py", "-k", "h2o-llama"),
    ),
)
