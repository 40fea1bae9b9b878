"""Faults in what every layer and head keeps: queries, scores, the choice, and the entries that move."""

from tests.fuzz.faults.mutant import Mutant

_RUNTIME, _PARTS = "integration/runtime/runtime.py", "integration/runtime/parts.py"
_GATHER, _DISPATCH, _MOVE = "integration/runtime/gather.py", "kernels/dispatch.py", "kernels/move.py"
_WINDOW = "cache/query_window.py"
_ORACLE = ("tests/e2e/test_oracle.py", "-k", "qwen3-page16-no-overlap-no-radix")
_FACTORS = ("tests/e2e/test_fp8.py", "-k", "factors_follow")
_SLIDING = ("tests/e2e/test_sliding_windows.py", "-k", "mellum-gather")
_SLIDING_BLOCKS = ("tests/e2e/test_sliding_windows.py", "-k", "olmo3-drop")

ENTRIES = (
    Mutant(
        "positions count resident tokens",
        "integration/hooks/model.py",
        "clamp_position(batch.orig_seq_lens.to(torch.int64))",
        "clamp_position(batch.seq_lens.to(torch.int64))",
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
        "the last token of the prompt is written",
        "kernels/move.py",
        "tokens = torch.arange(prompt_len, kv_len, device=keys.device)",
        "tokens = torch.arange(max(prompt_len - 1, 0), kv_len, device=keys.device)",
        ("tests/kernels/test_move.py",),
    ),
    Mutant(
        "what the tree does not hold of a prompt may be dropped",
        _RUNTIME,
        "prompt_len=state.held_prompt_len,\n            resident_len=req.kv.kv_allocated_len,",
        "prompt_len=req.kv.cache_protected_len,\n            resident_len=req.kv.kv_allocated_len,",
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
        "what is kept goes to other places of its pages",
        _MOVE,
        "tensor[pages[:budget], offsets[:budget], heads]",
        "tensor[pages[:budget], batch.page_size - 1 - offsets[:budget], heads]",
        ("tests/kernels/test_move.py",),
    ),
    Mutant(
        "what is kept is packed a place too far",
        _MOVE,
        "tensor[pages[:budget], offsets[:budget], heads]",
        "tensor[pages[1 : budget + 1], offsets[1 : budget + 1], heads]",
        ("tests/e2e/test_trtllm.py", "-k", "gather"),
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
        "a layer is scored by another's queries",
        _WINDOW,
        "steps = self.rings[layers].flatten(1, 2)",
        "steps = self.rings[layers].roll(1, 0).flatten(1, 2)",
        ("tests/e2e/test_experts.py",),
    ),
    Mutant(
        "logits are scaled by another model's factor",
        _PARTS,
        "logit_scale=float(layers[0].scaling)",
        "logit_scale=float(layers[0].scaling) * 4",
        _ORACLE,
    ),
    Mutant(
        "entries in fp8 are scored without their factors",
        "kernels/gathered.py",
        "return stored.view(buffers.dtype).float() * buffers.scales[layer]",
        "return stored.view(buffers.dtype).float()",
        _FACTORS,
    ),
    Mutant(
        "every layer in fp8 has the first one's factors",
        _PARTS,
        "return [layer.k_scale_float or 1.0 for layer in layers], [",
        "return [layers[0].k_scale_float or 1.0 for _ in layers], [",
        _FACTORS,
    ),
    Mutant(
        "factors of fp8 stay those of the old weights",
        _PARTS,
        "self.buffers.set_scales(*_scales_of(self.layers))",
        "pass",
        _FACTORS,
    ),
    Mutant(
        "layers that slide keep what scores best",
        _PARTS,
        "frozenset(layer.layer_id for layer in layers if layer.sliding_window_size > 0)",
        "frozenset()",
        _SLIDING,
    ),
    Mutant(
        "layers that slide keep the oldest",
        _DISPATCH,
        "scores = torch.arange(scores.shape[1], dtype",
        "scores = -torch.arange(scores.shape[1], dtype",
        _SLIDING,
    ),
    Mutant(
        "layers that slide have a say in which blocks go",
        _DISPATCH,
        "    if sliding:\n        scores[to_device(sliding, torch.int64, keys.device)] = 0.0\n",
        "",
        _SLIDING_BLOCKS,
    ),
    Mutant(
        "a request may keep a token less than a sliding window takes in",
        "integration/startup/sliding.py",
        "layer.sliding_window_size + 1 for",
        "layer.sliding_window_size for",
        _SLIDING,
    ),
    Mutant(
        "a request's own budget knows no sliding windows",
        "integration/runtime/requests.py",
        "least = max(server.least_budget, attention_window) if",
        "least = server.least_budget if",
        _SLIDING,
    ),
    Mutant(
        "a server may keep a token less than a sliding window takes in",
        "integration/startup/refusals.py",
        "(kept < sliding, f",
        "(kept < sliding - 1, f",
        ("tests/integration/startup/test_refused_models.py", "-k", "windows_are_served_in_one_pool"),
    ),
    Mutant(
        "a compaction that fails is passed over",
        _RUNTIME,
        "        self._way.compact(",
        "        with contextlib.suppress(Exception):\n            self._way.compact(",
        ("tests/e2e/test_sabotage.py", "-k", "choose"),
    ),
    Mutant(
        "verification is off",
        "integration/startup/verify_switch.py",
        "return os.environ.get(VERIFY_VARIABLE) == _ON",
        "return False",
        ("tests/e2e/test_sabotage.py", "-k", "verifies and gather"),
    ),
    Mutant(
        "a batch stays full though slots were freed",
        _RUNTIME,
        "batch.batch_is_full = False",
        "pass",
        ("tests/integration/runtime/test_streams.py",),
    ),
    Mutant(
        "freed slots are held back",
        _GATHER,
        "    allocator.free_group_end()\n",
        "",
        _ORACLE,
    ),
    Mutant(
        "a stateful policy forgets",
        _GATHER,
        "job.state.kept_state, job.state.memory = result.kept_state, result.memory",
        "pass",
        ("tests/e2e/test_policies.py", "-k", "h2o and qwen3"),
    ),
)
