"""Data-parallel attention: each rank has requests and a cache of its own, and all ranks step together."""

from types import SimpleNamespace
from typing import Any

import pytest

from devtools.tiny_models import tiny_model_path
from rkv_sglang.integration.hooks.scheduler import keep_decode_steps
from tests.e2e.workload import Setting, assert_same_tokens, greedy, outputs_at_restores, six_prompts
from tests.support.harness.gate import Control
from tests.support.harness.scheduler import rid_of, run_scheduler
from tests.support.oracle.dense import dense_generate

ON_A_CPU = {"RKV_STAND_IN_PADDING": "1"}
# Of the first rank one request, which outgrows the pool and is preempted after so many tokens; of the second two, which
# have ended by then.
LENGTHS, PAUSE = (94, 36, 38), 78


@pytest.mark.parametrize("tp_size", [2, 4], ids=["one-each", "two-each"])
def test_tokens_are_those_of_one_rank_though_one_idles_and_the_other_is_preempted(tp_size):
    model, setting = tiny_model_path("qwen3-moe"), Setting(budget=21, buffer=12)
    prompts = [prompt[:20] for prompt in (six_prompts()[5], *six_prompts()[2:4])]
    requests = [greedy(*own) for own in zip(prompts, LENGTHS, strict=True)]
    controls = [
        Control(0, "PauseGenerationReqInput", {"mode": "retract"}, after_tokens=(rid_of(0), PAUSE)),
        Control(0, "ContinueGenerationReqInput", {"torch_empty_cache": False}, wait=3),
        # When all is done.
        Control(400, "GetInternalStateReq"),
    ]
    flags = ["--model-path", str(model), "--tp-size", str(tp_size), "--attn-dp-size", "2"]
    flags += ["--max-total-tokens", "90", *setting.flags]
    env = ON_A_CPU | {"SGLANG_CPU_OMP_THREADS_BIND": "|".join("0101"[:tp_size])}
    result = run_scheduler(flags, requests, controls=controls, env=env, timeout=120)
    result.assert_clean()
    restores = outputs_at_restores(result, rid_of(0))
    assert len(restores) == 1
    for i, (prompt, length, output) in enumerate(zip(prompts, LENGTHS, result.outputs, strict=True)):
        expected = dense_generate(
            model,
            prompt,
            length,
            budget=setting.budget,
            buffer=setting.buffer,
            restore_at=restores if i == 0 else [],
            restored_in_flight=True,
            guessed_output_ids=tuple(output.output_ids),
        )
        assert_same_tokens(output.output_ids, expected, f"request {i}")
        assert output.info["kv_compactions"] == len(expected.compactions) > 0
    # As /server_info has them: of each rank that has requests of its own one, whatever ranks share these.
    stats = [state["kv_policy_stats"] for state in result.states]
    assert sorted(own["requests_answered"] for own in stats) == [1, 2]
    compactions = sum(output.info["kv_compactions"] for output in result.outputs)
    for name, total in (("compactions", compactions), ("answers_compressed", 3), ("requests_restored", 1)):
        assert sum(own[name] for own in stats) == total, (name, stats)


@pytest.mark.parametrize("others", [True, False])
def test_a_rank_that_decodes_never_votes_for_one_prefill_of_all(others):
    def batch(is_decode: bool) -> Any:
        return SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: is_decode))

    asked: list[Any] = []

    def vote(*, local_batch: Any, num_tokens: int) -> bool:
        asked.append((local_batch, num_tokens))
        return others

    assert keep_decode_steps(vote, local_batch=batch(True), num_tokens=3) is False
    assert not asked
    for idle_or_prefill in (None, batch(False)):
        assert keep_decode_steps(vote, local_batch=idle_or_prefill, num_tokens=3) is others
        assert asked.pop() == (idle_or_prefill, 3)
