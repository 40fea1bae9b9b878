"""Where nothing is compacted, nothing differs: not a token, not a bit of a log-probability, not a cached token."""

import pytest

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, greedy, six_prompts
from tests.support.harness.scheduler import Request, RunResult, run_scheduler

SETTING = Setting(budget=24, buffer=16)
CAPACITY = SETTING.budget + SETTING.buffer
WITHOUT_THE_PACKAGE = {"SGLANG_PLUGINS": "rkv_probe"}


def requests(num_tokens: int) -> list[Request]:
    """Six at once, then the first again with its answer, as the next turn of a conversation has it."""
    first, *others = six_prompts()
    turns = [greedy(prompt, num_tokens, return_logprob=True) for prompt in (first, *others)]
    # A prompt of the answers' length: what the tree kept of the first turns decides how much of it is found.
    return [*turns, greedy(others[-1], num_tokens, return_logprob=True, when_idle=True)]


def answers(result: RunResult) -> list[tuple]:
    result.assert_clean()
    return [(out.output_ids, out.output_logprobs, out.cached_tokens, out.finish_reason) for out in result.outputs]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    ("name", "num_tokens", "policy_flags"),
    [
        ("budget never reached", 120, ["--kv-policy", "rkv", "--rkv-budget", "120"]),
        # The cache of an answer's last token is never written, so this many tokens fill B + buf - 1 slots.
        ("one token short of the first compaction", CAPACITY, SETTING.flags),
        ("full, and no step left to compact for", CAPACITY + 1, SETTING.flags),
    ],
)
def test_byte_identical_to_no_policy_and_to_no_package(name, num_tokens, policy_flags, page_size):
    flags = ["--model-path", str(tiny_model_path("llama-gqa")), "--page-size", str(page_size)]
    with_policy = run_scheduler(flags + policy_flags, requests(num_tokens))
    without_policy = run_scheduler(flags, requests(num_tokens))
    without_package = run_scheduler(flags, requests(num_tokens), env=WITHOUT_THE_PACKAGE)

    assert "rkv_sglang" not in without_package.log
    assert with_policy.probe.compactions == []
    assert answers(with_policy) == answers(without_policy) == answers(without_package)
    # One token more does compact, so the runs above ended where they claim to.
    if num_tokens == CAPACITY + 1:
        assert run_scheduler(flags + policy_flags, requests(num_tokens + 1)).probe.compactions


def test_without_a_policy_nothing_but_the_doors_is_hooked():
    flags = ["--model-path", str(tiny_model_path("llama-gqa"))]
    log = run_scheduler(flags, requests(4)).log
    hooked = {
        line.split(" to ")[1].split(" ")[0] for line in log.splitlines() if "Applied" in line and "=rkv_sglang" in line
    }
    assert hooked <= {
        "sglang.srt.server_args.ServerArgs",
        "sglang.srt.entrypoints.engine.Engine.server_args_class",
        "sglang.srt.managers.scheduler.Scheduler.__init__",
    }
