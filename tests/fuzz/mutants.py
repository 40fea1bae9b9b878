"""Faults to plant in the package, one at a time, to see that they are found.

Each is one change of one file, and the test that must find it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: What is wrong.
        file: Below ``rkv_sglang/``.
        old: Stands in the file once.
        new: Takes its place.
        test: Arguments of pytest: the test that finds it.
    """

    name: str
    file: str
    old: str
    new: str
    test: tuple[str, ...]


_LENGTHS, _PLAN = "sizes/lengths.py", "sizes/compaction_plan.py"
_GATHER = "integration/runtime/gather.py"
_DROP, _BLOCKS = "cache/drop.py", "cache/block_choice.py"
_RUNTIME, _RESTORE = "integration/runtime/runtime.py", "integration/runtime/restore.py"
_DROPPED = ("tests/cache/test_drop.py",)
_ORACLE = ("tests/e2e/test_oracle.py",)
_RESTORED = ("tests/e2e/test_restore.py", "-k", "beyond_the_pool_ends and 1-no-overlap")
_RECOMPUTED = ("tests/e2e/test_traps.py", "-k", "recomputes_at_the_same_token")
_TWINS = ("tests/e2e/test_traps.py", "-k", "identical_prompts")

MUTANTS = (
    Mutant(
        "positions count resident tokens",
        "integration/hooks/model.py",
        "clamp_position(batch.orig_seq_lens.to(torch.int64))",
        "clamp_position(batch.seq_lens.to(torch.int64))",
        _ORACLE,
    ),
    Mutant(
        "the logical length is one too long",
        _LENGTHS,
        "return resident_len + self.evicted_tokens\n",
        "return resident_len + self.evicted_tokens + 1\n",
        _ORACLE,
    ),
    Mutant(
        "the worst tokens are kept",
        "algorithm/selection.py",
        "descending=True, stable=True",
        "descending=False, stable=True",
        ("tests/algorithm/test_selection.py",),
    ),
    Mutant(
        "kept tokens are not in temporal order",
        "algorithm/selection.py",
        "best_first[:, : budget - window].sort(dim=1).values",
        "best_first[:, : budget - window]",
        ("tests/algorithm/test_selection.py",),
    ),
    Mutant(
        "a page is freed that still holds kept tokens",
        _PLAN,
        "freed_start = ceil_to_page(kept_len, page_size)",
        "freed_start = kept_len // page_size * page_size",
        ("tests/sizes/test_lengths_and_plan.py",),
    ),
    Mutant(
        "a page is never freed",
        _PLAN,
        "freed_start = ceil_to_page(kept_len, page_size)",
        "freed_start = ceil_to_page(kept_len, page_size) + page_size",
        ("tests/sizes/test_lengths_and_plan.py",),
    ),
    Mutant(
        "the last token of the prompt is written",
        "kernels/move.py",
        "tokens = torch.arange(prompt_len, kv_len, device=keys.device)",
        "tokens = torch.arange(max(prompt_len - 1, 0), kv_len, device=keys.device)",
        ("tests/kernels/test_move.py",),
    ),
    Mutant(
        "what the tree does not hold of a prompt may be dropped",
        _RUNTIME,
        "prompt_len=state.prompt_len,\n            resident_len=kv.kv_allocated_len,",
        "prompt_len=kv.cache_protected_len,\n            resident_len=kv.kv_allocated_len,",
        ("tests/e2e/test_memory.py", "-k", "more_than_the_pool_holds"),
    ),
    Mutant(
        "values move as another head's",
        "kernels/move.py",
        "= tensor[pages[kept], offsets[kept], heads]",
        "= tensor[pages[kept], offsets[kept], heads if buffers is keys else heads.flip(0)]",
        ("tests/kernels/test_move.py",),
    ),
    Mutant(
        "the window's queries are read from one step off",
        "cache/query_window.py",
        "(logical_len + step) % self.window",
        "(logical_len + step + 1) % self.window",
        ("tests/cache/test_query_window.py",),
    ),
    Mutant(
        "a released query row is still written",
        "cache/query_window.py",
        "self._free_rows.append(row)\n            self._changed[req_pool_idx] = 0",
        "self._free_rows.append(row)",
        ("tests/cache/test_query_window.py",),
    ),
    Mutant(
        "a query row is taken one step late",
        _RUNTIME,
        "if remaining > self.config.window:",
        "if remaining >= self.config.window:",
        _ORACLE,
    ),
    Mutant(
        "a batch stays full though slots were freed",
        _RUNTIME,
        "batch.batch_is_full = False",
        "pass",
        ("tests/e2e/test_memory.py", "-k", "fills_the_pool and 1"),
    ),
    Mutant(
        "the lengths of the batch on the device are not shortened",
        "cache/step_tensors.py",
        "return seq_lens - evicted_cpu.to(seq_lens, non_blocking=True), seq_lens_cpu - evicted_cpu",
        "return seq_lens, seq_lens_cpu - evicted_cpu",
        ("tests/cache/test_step_tensors.py",),
    ),
    Mutant(
        "a compacted request puts its answer into the tree",
        _RUNTIME,
        "        job.req.skip_radix_cache_insert = True\n",
        "",
        ("tests/e2e/test_traps.py", "-k", "goes_on_from_it"),
    ),
    Mutant(
        "a recomputed request puts its answer into the tree",
        _RESTORE,
        "get_runtime().may_compact(req):\n        req.skip_radix_cache_insert = True\n",
        "False:\n        pass\n",
        _TWINS,
    ),
    Mutant(
        "a recomputed request shares a finished twin's answer",
        "integration/hooks/restore.py",
        "    if len(req.output_ids) > 0 and get_runtime().may_compact(req):\n        return min(",
        "    if False:\n        return min(",
        _TWINS,
    ),
    Mutant(
        "a recomputed request still counts what it had lost",
        _RESTORE,
        "        state.forget_cache()\n    state.next_check = 0",
        "        pass\n    state.next_check = 0",
        _RECOMPUTED,
    ),
    Mutant(
        "a recomputed request is compacted without its window of queries",
        _LENGTHS,
        "config.window - decode_steps, 0)",
        "0)",
        ("tests/sizes/test_lengths_and_plan.py",),
    ),
    Mutant(
        "compaction comes one token late",
        _LENGTHS,
        "return max(config.capacity - head_start - (resident_len - prompt_len)",
        "return max(config.capacity + 1 - head_start - (resident_len - prompt_len)",
        ("tests/sizes/test_lengths_and_plan.py",),
    ),
    Mutant(
        "a request is compacted after its last decode step",
        _LENGTHS,
        "return state.generated_len(resident_len) + 1 < state.max_new_tokens",
        "return state.generated_len(resident_len) < state.max_new_tokens",
        ("tests/e2e/test_traps.py", "-k", "last_token_is_in_flight"),
    ),
    Mutant(
        "a stateful policy forgets",
        _GATHER,
        "job.state.kept_state, job.state.memory = result.kept_state, result.memory",
        "pass",
        ("tests/e2e/test_policies.py", "-k", "h2o and qwen3"),
    ),
    Mutant(
        "the head start is of other tokens",
        "sizes/stagger.py",
        "ids.extend(output_ids[:NUM_HASHED_OUTPUTS])",
        "ids.extend(output_ids[1:NUM_HASHED_OUTPUTS])",
        ("tests/sizes/test_stagger.py",),
    ),
    Mutant(
        "admission reserves a token too little",
        "sizes/reservation.py",
        "return min(max(tokens_left, 0), steps_until_due(",
        "return -1 + min(max(tokens_left, 0), steps_until_due(",
        ("tests/sizes/test_reservation.py",),
    ),
    Mutant(
        "a request's own budget is ignored",
        "integration/runtime/requests.py",
        "budget, buffer = asked.get(BUDGET_FIELD, server.budget), asked.get(BUFFER_FIELD, server.buffer)",
        "budget, buffer = server.budget, asked.get(BUFFER_FIELD, server.buffer)",
        ("tests/e2e/test_request_settings.py", "-k", "eight_settings and 1"),
    ),
    Mutant(
        "a bad request is served as if it had asked for nothing",
        "integration/hooks/admission.py",
        "        req.set_finish_with_abort(str(error))\n",
        "        pass\n",
        ("tests/e2e/test_request_settings.py", "-k", "bad_request_gets_400"),
    ),
    Mutant(
        "a restored token has the position of a resident one",
        _RESTORE,
        "forward_batch.positions = positions + offsets.to(positions, non_blocking=True)",
        "forward_batch.positions = positions",
        ("tests/integration/runtime/test_restore.py",),
    ),
    Mutant(
        "later tokens of a restored request have the position of resident ones",
        "integration/hooks/restore.py",
        "    if is_any_restored:\n",
        "    if False:\n",
        _RESTORED,
    ),
    Mutant(
        "the token in flight is copied too",
        _RESTORE,
        "saved_len = req.kv.kv_allocated_len - num_dropped",
        "saved_len = req.kv.kv_allocated_len",
        ("tests/integration/runtime/test_restore.py",),
    ),
    Mutant(
        "a copy comes back shifted by what is shared",
        "cache/host_copy.py",
        "host[layer, first:].to(",
        "host[layer, : len(slots)].to(",
        ("tests/cache/test_host_copy.py",),
    ),
    Mutant(
        "freed slots are held back",
        _GATHER,
        "    allocator.free_group_end()\n",
        "",
        ("tests/e2e/test_oracle.py",),
    ),
    Mutant(
        "a counter counts compactions for requests",
        "integration/runtime/stats.py",
        "self.requests_compressed += state.compactions + state.discarded_compactions == 1",
        "self.requests_compressed += 1",
        ("tests/e2e/test_request_settings.py", "-k", "sums_of_meta_info"),
    ),
    Mutant(
        "an answer says that nothing was evicted",
        "integration/hooks/answers.py",
        "len(req.output_ids) - 1 - state.evicted_tokens",
        "len(req.output_ids) - 1",
        ("tests/e2e/test_request_settings.py", "-k", "what_was_compressed"),
    ),
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
        ("tests/e2e/test_drop.py", "-k", "six_hundred_slots"),
    ),
    Mutant(
        "blocks are scored by the last layer alone",
        _BLOCKS,
        "totals += scores.sum(dim=(0, 1))",
        "totals += scores[-1].sum(dim=0)",
        ("tests/e2e/test_drop.py", "-k", "every_other_policy and rkv"),
    ),
    Mutant(
        "the blocks of the highest scores go",
        _BLOCKS,
        "ranks = means.argsort(dim=1, stable=True)",
        "ranks = means.argsort(dim=1, stable=True, descending=True)",
        _DROPPED,
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
        "a policy forgets what the blocks that stayed had scored",
        "integration/runtime/drop.py",
        "job.state.kept_state = choice.kept_state",
        "pass",
        ("tests/e2e/test_drop.py", "-k", "every_other_policy and h2o"),
    ),
    Mutant(
        "a token is left out of the penalties of a request that comes back",
        "integration/runtime/penalties.py",
        "for number in range(num_outputs)]",
        "for number in range(num_outputs - 1)]",
        ("tests/e2e/test_request_state.py",),
    ),
)
