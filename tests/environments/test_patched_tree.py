"""An SGLang with all patches in serves through its own calls of the policy, and answers as ever."""

import json
from pathlib import Path

import pytest

from tests.e2e.workload import assert_same_tokens, oracle, six_prompts
from tests.environments.answers import HEAD, HOOKS, MODEL, NUM_TOKENS, expected_hooks
from tests.environments.trees import ENVIRONMENTS, capabilities_in, make_tree, run_module
from tests.support.harness.environment import ORACLE_APPLIES, WHY_NOT


@pytest.mark.skipif(not ORACLE_APPLIES, reason=WHY_NOT)
def test_a_fully_patched_sglang_answers_as_the_oracle_and_nothing_is_hooked_that_it_calls(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, ENVIRONMENTS[1])
    capabilities = capabilities_in(tree)
    assert capabilities == {hook.capability for hook in HOOKS} - {""} | {"observe"}
    run_module(tree, ["tests.environments.answers", str(tmp_path / "found.json"), "plain"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert Path(found["sglang"]).is_relative_to(tree.resolve())
    plain = found["runs"]["plain"]
    assert set(plain["hooked"]) == expected_hooks("plain", capabilities) != expected_hooks("plain", frozenset())
    # The others are sampled.
    for prompt, answer in zip(six_prompts()[:3], plain["answers"], strict=False):
        found_ids = answer["output_ids"]
        expected = oracle(MODEL, prompt, NUM_TOKENS, HEAD, found_ids)
        assert_same_tokens(found_ids, expected, f"prompt of {len(prompt)}")
        assert answer["info"]["kv_compactions"] >= 3
