"""Faults in what a request asks for, what it is told, and what of it is shared."""

from tests.fuzz.faults.mutant import Mutant

_RUNTIME, _REQUESTS = "integration/runtime/runtime.py", "integration/runtime/requests.py"
_RESTORE, _ADMISSION = "integration/runtime/restore.py", "integration/hooks/admission.py"
_TWINS = ("tests/e2e/test_traps.py", "-k", "identical_prompts")
_RECOMPUTED = ("tests/e2e/test_traps.py", "-k", "recomputes_at_the_same_token")
_MARKED = ("tests/e2e/test_partial_rollouts.py", "-k", "uninterrupted_run and staggered")

REQUESTS = (
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
        "get_runtime().may_compact(req):\n        # A copy",
        "False:\n        # A copy",
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
        "a request's own budget is ignored",
        "integration/runtime/requests.py",
        "budget, buffer = asked.get(BUDGET_FIELD, server.budget), asked.get(BUFFER_FIELD, server.buffer)",
        "budget, buffer = server.budget, asked.get(BUFFER_FIELD, server.buffer)",
        ("tests/e2e/test_request_settings.py", "-k", "eight_settings and 1"),
    ),
    Mutant(
        "a bad request is served as if it had asked for nothing",
        "integration/hooks/admission.py",
        "            req.set_finish_with_abort(str(error))\n",
        "            pass\n",
        ("tests/e2e/test_sliding_windows.py", "-k", "olmo3-sliding-gather"),
    ),
    Mutant(
        "a counter counts compactions for requests",
        "integration/runtime/stats.py",
        "self.requests_compressed += state.compactions + state.discarded_compactions == 1",
        "self.requests_compressed += 1",
        ("tests/integration/runtime/test_metrics.py", "-k", "counts_once"),
    ),
    Mutant(
        "an answer says that nothing was evicted",
        "integration/hooks/answers.py",
        "len(req.output_ids) - 1 - state.evicted_tokens",
        "len(req.output_ids) - 1",
        ("tests/e2e/test_request_state.py", "-k", "discarded_counts_no_more"),
    ),
    Mutant(
        "an answer that comes back marked is kept as prompt",
        _REQUESTS,
        "return int(getattr(req, PROMPT_ATTRIBUTE, len(req.origin_input_ids)))",
        "return len(req.origin_input_ids)",
        _MARKED,
    ),
    Mutant(
        "an answer that comes back marked goes into the tree",
        _ADMISSION,
        "    if carried > 0 and runtime.may_compact(req):",
        "    if False:",
        _MARKED,
    ),
    Mutant(
        "an answer that comes back marked is found in the tree",
        "integration/hooks/restore.py",
        "(len(req.output_ids) > 0 or prompt_len < len(req.origin_input_ids)) and",
        "len(req.output_ids) > 0 and",
        _MARKED,
    ),
    Mutant(
        "an answer that comes back marked has another head start",
        _REQUESTS,
        "[*carried, *req.output_ids]",
        "req.output_ids",
        _MARKED,
    ),
    Mutant(
        "what came back marked delays its compaction as a prompt would",
        _RUNTIME,
        "steps_until_due(config, state.held_prompt_len, resident_len, req",
        "steps_until_due(config, len(req.origin_input_ids) - state.evicted_prompt_tokens, resident_len, req",
        _MARKED,
    ),
    Mutant(
        "of a prompt that is compacted what came back marked is a part",
        "integration/runtime/prompts/compaction.py",
        "PromptPlan(state.prompt_len, req.kv.kv_allocated_len,",
        "PromptPlan(len(req.origin_input_ids), req.kv.kv_allocated_len,",
        _MARKED,
    ),
    Mutant(
        "an answer says that what came back marked is its prompt",
        "integration/hooks/answers.py",
        "PROMPT_KEY: state.held_prompt_len,",
        "PROMPT_KEY: len(req.origin_input_ids) - state.evicted_prompt_tokens,",
        _MARKED,
    ),
    Mutant(
        "a mark may leave an image behind the prompt",
        _REQUESTS,
        "    if value < images_end:\n",
        "    if False:\n",
        ("tests/e2e/test_mrope.py", "-k", "images_always_stay"),
    ),
    Mutant(
        "what came back marked does not count as generated",
        _REQUESTS,
        "most = int(req.sampling_params.max_new_tokens) + num_carried_tokens(req)",
        "most = int(req.sampling_params.max_new_tokens)",
        _MARKED,
    ),
)
