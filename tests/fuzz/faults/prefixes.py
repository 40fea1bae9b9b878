"""Faults in named prefixes: who may use them, where what follows them stands, and what they hold for how long."""

from tests.fuzz.faults.mutant import Mutant

_READING, _MAKING = "integration/runtime/prefixes/reading.py", "integration/runtime/prefixes/making.py"
_NAMED, _HOOKS = "integration/runtime/prefixes/named.py", "integration/hooks/restore.py"
_TESTS = "tests/e2e/test_prefixes.py"
_SHARED = (_TESTS, "-k", "oracle_says and rkv")
_DELETED = (_TESTS, "-k", "gives_all_back")

PREFIXES = (
    Mutant(
        "a prompt that stayed whole is compacted once a prefix is deleted",
        "integration/runtime/prompts/pending.py",
        "pool_size = parts.pool_size_for(req) if state.pool_size is None else state.pool_size",
        "pool_size = parts.pool_size_for(req)",
        (_TESTS, "-k", "decided_once"),
    ),
    Mutant(
        "a long answer keeps a prefix from being made",
        "integration/runtime/prefixes/room.py",
        "if state is not None and state.evicted_tokens > 0:",
        "if False:",
        (_TESTS, "-k", "outgrown_the_pool"),
    ),
    Mutant(
        "a named prefix may be evicted",
        _MAKING,
        "    return tree_cache.lock(result.last_device_node)",
        "    lock = tree_cache.lock(result.last_device_node)\n    tree_cache.unlock(lock)\n    return lock",
        _SHARED,
    ),
    Mutant(
        "a deleted prefix keeps its slots",
        _READING,
        "    parts.prefixes.forget(prefix)\n    parts.scheduler.tree_cache.unlock(prefix.lock)\n",
        "    parts.prefixes.forget(prefix)\n",
        _DELETED,
    ),
    Mutant(
        "what follows a prefix stands a position too early",
        _NAMED,
        "return self.length - self.budget",
        "return self.length - self.budget - 1",
        _SHARED,
    ),
    Mutant(
        "a prefix comes back behind a preempted request at its first position",
        "integration/runtime/restore.py",
        "evicted = [number + gap_of(req) for number, req",
        "evicted = [number + gap_of(req) * (len(req.output_ids) == 0) for number, req",
        (_TESTS, "-k", "comes_back_behind"),
    ),
    Mutant(
        "a prefix outlives a flush",
        _HOOKS,
        "        drop_prefixes(runtime.parts)\n",
        "        pass\n",
        (_TESTS, "-k", "no_prefix_is_left and flush"),
    ),
    Mutant(
        "new weights take a prefix its name and leave it its slots",
        _READING,
        "if is_held and lock is not None:",
        "if False:",
        (_TESTS, "-k", "no_prefix_is_left and weights"),
    ),
    Mutant(
        "requests that wait go on from a prefix that was deleted",
        _READING,
        "waiting = [req for req in scheduler.waiting_queue if used_by(req) is gone]",
        "waiting: list[Any] = []",
        _DELETED,
    ),
    Mutant(
        "what a prefix will take is not reserved",
        "integration/runtime/prefixes/room.py",
        "return 0 if prefix is None else prefix.budget",
        "return 0",
        (_TESTS, "-k", "waits_for_its_slots"),
    ),
    Mutant(
        "a prefix's task is taken from the tree",
        _HOOKS,
        "return min(max_prefix_len, made.length)",
        "return max_prefix_len",
        _SHARED,
    ),
    Mutant(
        "a prefix's document is judged by another layer's queries",
        "integration/runtime/prefixes/judging.py",
        "return self.queries[layers, None]",
        "return self.queries.roll(1, 0)[layers, None]",
        _SHARED,
    ),
    Mutant(
        "a document in blocks loses its window",
        "integration/runtime/prefixes/copying.py",
        "plan.of_blocks(window, block)",
        "plan.of_blocks(0, block)",
        ("tests/e2e/test_prefix_blocks.py", "-k", "oracle_says"),
    ),
    Mutant(
        "slots of a document's task are copied in place of its last block",
        "integration/runtime/prefixes/copying.py",
        "kept_tokens(of_blocks, choice)[: plan.budget]",
        "kept_tokens(of_blocks, choice)[-plan.budget :]",
        ("tests/e2e/test_prefix_blocks.py", "-k", "oracle_says"),
    ),
    Mutant(
        "a document is judged by keys that are not written yet",
        "integration/runtime/prefixes/judging.py",
        "        self._waiting = (layer, queries.clone(), place)\n",
        "        self._waiting = (layer, queries.clone(), place)\n        self._judge_waiting()\n",
        ("tests/integration/runtime/test_judging.py",),
    ),
    Mutant(
        "a document is judged by a task that sees the next token",
        "algorithm/document_attention.py",
        "is_later = keys > places[:, None]",
        "is_later = keys > places[:, None] + 1",
        ("tests/algorithm/test_document_attention.py",),
    ),
)
