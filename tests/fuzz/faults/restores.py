"""Faults in what becomes of a preempted request: its copy, its way back, its penalties."""

from tests.fuzz.faults.mutant import Mutant

_RESTORE, _HOOKS, _COPY = "integration/runtime/restore.py", "integration/hooks/restore.py", "cache/host_copy.py"
_PENALTIES = "integration/runtime/penalties.py"
_RESTORED = ("tests/e2e/test_restore.py", "-k", "beyond_the_pool_ends and 1-no-overlap")
_FLUSHED = ("tests/e2e/test_restore.py", "-k", "old_kv and flush")
_WAITING = ("tests/integration/runtime/test_restore.py",)
_COPIED = ("tests/cache/test_host_copy.py",)
_STATE = ("tests/e2e/test_request_state.py",)

RESTORES = (
    Mutant(
        "a restored token has the position of a resident one",
        _RESTORE,
        "forward_batch.positions = positions + offsets\n",
        "forward_batch.positions = positions\n",
        _WAITING,
    ),
    Mutant(
        "later tokens of a restored request have the position of resident ones",
        "integration/hooks/restore.py",
        "    if is_any_restored or any(used_by(req) is not None for req in batch.reqs):\n",
        "    if False:\n",
        _RESTORED,
    ),
    Mutant(
        "the token in flight is copied too",
        _RESTORE,
        "saved_len = req.kv.kv_allocated_len - num_dropped",
        "saved_len = req.kv.kv_allocated_len",
        _WAITING,
    ),
    Mutant(
        "a copy comes back shifted by what is shared",
        "cache/host_copy.py",
        "host[layer, first:].to(",
        "host[layer, : len(slots)].to(",
        ("tests/cache/test_host_copy.py",),
    ),
    Mutant(
        "nobody is copied",
        _RESTORE,
        "    state.host_copy = _save(runtime, req, saved_len)\n",
        "",
        _RESTORED,
    ),
    Mutant(
        "bytes in fp8 come back in another order",
        _COPY,
        "buffer.index_select(0, slots)",
        "buffer.index_select(0, slots.flip(0) if buffer.dtype == torch.uint8 else slots)",
        _COPIED,
    ),
    Mutant(
        "of latent vectors only the first layer's come back",
        "integration/runtime/prompts/slots.py",
        "return (pool.kv_buffer, ()) if",
        "return (pool.kv_buffer[:1], ()) if",
        ("tests/e2e/test_latent_attention.py", "-k", "random_attention"),
    ),
    Mutant(
        "a restored request forgets what its policy remembers",
        _RESTORE,
        "    req.prefix_len = kv.kv_allocated_len =",
        "    state.drop_tensors()\n    req.prefix_len = kv.kv_allocated_len =",
        ("tests/e2e/test_restore.py", "-k", "stateful_policy_remembers"),
    ),
    Mutant(
        "a request that comes back is cut where a chunk ends",
        "integration/runtime/prefill_adder.py",
        "    if copy is None:\n        yield\n",
        "    if True:\n        yield\n",
        ("tests/e2e/test_restore.py", "-k", "beyond_the_pool_ends and 1-no-radix-chunks"),
    ),
    Mutant(
        "a request that waits counts by all it has seen",
        _HOOKS,
        "    if host_copy_of(req) is None:\n        refresh(req)\n",
        "    refresh(req)\n",
        _WAITING,
    ),
    Mutant(
        "ranks do not agree on whose copy there is",
        _RESTORE,
        "    if scheduler.attn_tp_group.world_size > 1:\n",
        "    if False:\n",
        _WAITING,
    ),
    Mutant(
        "a request that waits keeps its query row",
        _RESTORE,
        "    runtime.forget_queries(req)\n",
        "",
        _WAITING,
    ),
    Mutant(
        "a copy outlives a flush",
        _HOOKS,
        "    if is_flushed:\n",
        "    if False:\n",
        _FLUSHED,
    ),
    Mutant(
        "a copy outlives the weights it was made with",
        _HOOKS,
        'drop_copies_of("the weights changed")',
        "pass",
        ("tests/e2e/test_restore.py", "-k", "old_kv and weights"),
    ),
    Mutant(
        "a restored request's sample is drawn at its resident length",
        _HOOKS,
        "forward_batch.seq_lens = seq_lens + evicted.to(seq_lens)",
        "forward_batch.seq_lens = seq_lens",
        _WAITING,
    ),
    Mutant(
        "who fits neither way waits for ever",
        _HOOKS,
        "    if not end_without_prefix(parts, req) and not end_if_hopeless(req):\n        enqueue",
        "    if not end_without_prefix(parts, req):\n        enqueue",
        _WAITING,
    ),
    Mutant(
        "a token is left out of the penalties of a request that comes back",
        "integration/runtime/penalties.py",
        "for number in range(num_outputs)]",
        "for number in range(num_outputs - 1)]",
        _STATE,
    ),
    Mutant(
        "min_new_tokens begins anew",
        _PENALTIES,
        "penalizer.len_output_tokens[row] += len(ids)",
        "pass",
        _STATE,
    ),
    Mutant(
        "a prefill in between leaves a token out of others' penalties",
        _PENALTIES,
        "tokens.append(counted_token(req, num_cached - len(req.origin_input_ids), _lag(batch)))",
        "tokens.append(int((req.output_ids or req.origin_input_ids)[-1]))",
        _STATE,
    ),
)
