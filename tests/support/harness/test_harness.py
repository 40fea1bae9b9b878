"""The harness itself, on SGLang without a policy: what it runs is right, and what it must notice it does notice."""

import multiprocessing
import random
import time
from functools import cache

import psutil
import pytest
import torch
import zmq

from devtools.tiny_models import VOCAB_SIZE, tiny_model_path
from tests.support.harness.job import _Run
from tests.support.harness.scheduler import (
    LauncherRefused,
    Output,
    Request,
    SchedulerFailed,
    _Zygote,
    rid_of,
    run_scheduler,
)
from tests.support.harness.server import Server
from tests.support.harness.stale_bindings import CHECK_VARIABLE

MODEL = "llama-gqa"


def flags(*more: str) -> list[str]:
    return ["--model-path", str(tiny_model_path(MODEL)), *more]


def random_prompt(rng: random.Random, length: int) -> list[int]:
    # Ids 0 to 2 are special.
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


def greedy(num_tokens: int) -> dict[str, object]:
    return {"max_new_tokens": num_tokens, "ignore_eos": True}


@cache
def reference_model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_path(MODEL), dtype=torch.float32).eval()


@torch.no_grad()
def reference(prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers and their log-probabilities, the whole sequence computed anew at each step."""
    tokens, logprobs = list(prompt), []
    for _ in range(num_tokens):
        logits = reference_model()(torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
        logprobs.append(float(torch.log_softmax(logits, dim=-1)[tokens[-1]]))
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--page-size", "16", "--disable-overlap-schedule"],
        ["--page-size", "64", "--chunked-prefill-size", "64"],
        ["--disable-radix-cache", "--chunked-prefill-size", "16"],
    ],
    ids=["defaults", "page16-no-overlap", "page64-chunked", "no-radix-chunked"],
)
def test_a_run_equals_transformers(more: list[str], rng: random.Random) -> None:
    num_tokens = 24
    shared = random_prompt(rng, 70)
    prompts = [random_prompt(rng, rng.randrange(1, 100)), shared, shared[:40] + random_prompt(rng, 9)]
    requests = [
        Request(input_ids=prompt, sampling_params=greedy(num_tokens), return_logprob=True, at_step=3 * index)
        for index, prompt in enumerate(prompts)
    ]
    result = run_scheduler(flags(*more), requests)
    result.assert_clean()
    for prompt, output in zip(prompts, result.outputs, strict=True):
        tokens, logprobs = reference(prompt, num_tokens)
        assert output.output_ids == tokens
        assert output.output_logprobs == pytest.approx(logprobs, abs=1e-3)
        assert output.finish_reason["type"] == "length"


def test_requests_arrive_wait_and_abort_as_asked(rng: random.Random) -> None:
    prompt = random_prompt(rng, 30)
    requests = [
        Request(input_ids=prompt, sampling_params=greedy(40)),
        Request(input_ids=random_prompt(rng, 10), sampling_params=greedy(40), at_step=10),
        Request(input_ids=random_prompt(rng, 10), sampling_params=greedy(500), abort_after_tokens=20),
        Request(input_ids=prompt, sampling_params=greedy(2), when_idle=True),
    ]
    result = run_scheduler(flags(), requests)
    result.assert_clean()
    first, late, aborted, after = result.outputs
    assert len(first.output_ids) == len(late.output_ids) == 40
    assert aborted.finish_reason["type"] == "abort"
    # An abort takes effect a step or two after it is asked for.
    assert 20 <= len(aborted.output_ids) <= 24
    # The last of 30 prompt tokens is always computed, all others came from the first request.
    assert after.cached_tokens == 29
    start_of_late = result.probe.per_request(rid_of(1))[0]["step"]
    assert start_of_late - result.probe.per_request(rid_of(0))[0]["step"] == 10
    assert result.probe.peak_running == 3
    assert len(result.probe.idles) >= 2


def test_a_run_can_be_repeated(rng: random.Random) -> None:
    requests = [
        Request(input_ids=random_prompt(rng, 40), sampling_params=greedy(30), at_step=rng.randrange(20))
        for _ in range(6)
    ]

    def observed() -> tuple[list[Output], list[object]]:
        # A pool that holds three of the six at once: requests wait.
        result = run_scheduler(flags("--max-total-tokens", "192", "--page-size", "16"), requests)
        result.assert_clean()
        steps = result.probe.steps
        # Steps are counted from the start of the process, which is not the same moment each time.
        return result.outputs, [{**step, "step": step["step"] - steps[0]["step"]} for step in steps]

    assert observed() == observed()


def test_forced_retraction_is_seen_and_harmless(rng: random.Random) -> None:
    prompts = [random_prompt(rng, 20) for _ in range(3)]
    env = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "8"}
    requests = [Request(input_ids=prompt, sampling_params=greedy(30)) for prompt in prompts]
    result = run_scheduler(flags("--page-size", "16"), requests, env=env)
    result.assert_clean()
    assert result.probe.retractions > 0
    assert result.probe.retractions == sum(output.retractions for output in result.outputs)
    assert result.output_ids == [reference(prompt, 30)[0] for prompt in prompts]


def test_every_tensor_parallel_rank_is_watched(rng: random.Random) -> None:
    prompts = [random_prompt(rng, 20) for _ in range(2)]
    requests = [Request(input_ids=prompt, sampling_params=greedy(12), at_step=2) for prompt in prompts]
    # One NUMA node has to be told how two ranks share it.
    result = run_scheduler(flags("--tp", "2"), requests, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}, timeout=300)
    result.assert_clean()
    assert len(result.probe.other_ranks) == 1
    assert result.probe.other_ranks[0].steps == result.probe.steps
    assert result.output_ids == [reference(prompt, 12)[0] for prompt in prompts]


def test_the_probe_finds_one_flipped_bit_in_a_slot_of_the_tree(rng: random.Random) -> None:
    request = Request(input_ids=random_prompt(rng, 30), sampling_params=greedy(20))
    result = run_scheduler(flags(), [request], env={"RKV_PROBE_FAULT": "flip_tree@1"})
    (violation,) = result.probe.violations
    assert violation["violation"] == "contents"
    assert [slot["holder"] for slot in violation["slots"]] == ["tree"]
    with pytest.raises(AssertionError, match="contents"):
        result.assert_clean()


def test_the_probe_finds_one_flipped_bit_in_a_slot_of_a_request(rng: random.Random) -> None:
    request = Request(input_ids=random_prompt(rng, 30), sampling_params=greedy(20))
    result = run_scheduler(flags("--page-size", "16"), [request], env={"RKV_PROBE_FAULT": "flip_private@1"})
    (violation,) = result.probe.violations
    assert violation["violation"] == "contents"
    # The first page of 16 went to the tree.
    assert [slot["holder"] for slot in violation["slots"]] == [f"request {rid_of(0)} position 16"]


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_probe_finds_a_leak(page_size: int, rng: random.Random) -> None:
    request = Request(input_ids=random_prompt(rng, 30), sampling_params=greedy(20))
    # SGLang's own check would end the scheduler before the probe looks again.
    env = {"RKV_PROBE_FAULT": "leak@1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "0"}
    with pytest.raises(SchedulerFailed, match="leak") as caught:
        run_scheduler(flags("--page-size", str(page_size)), [request], env=env)
    violations = caught.value.probe.violations
    assert violations[0]["violation"] == "ownership"
    assert (violations[0]["num_lost"], violations[0]["num_shared"]) == (1, 0)


def test_the_strict_checks_are_on(rng: random.Random) -> None:
    request = Request(input_ids=random_prompt(rng, 30), sampling_params=greedy(20))
    with pytest.raises(SchedulerFailed, match="Full Pool Mem Leak Detected"):
        run_scheduler(flags(), [request], env={"RKV_PROBE_FAULT": "leak@1"})


def test_the_probe_holds_requests_to_their_bound(rng: random.Random) -> None:
    request = Request(input_ids=random_prompt(rng, 30), sampling_params=greedy(20))
    within = run_scheduler(flags(), [request], env={"RKV_PROBE_MAX_PRIVATE": "19"})
    within.assert_clean()
    beyond = run_scheduler(flags(), [request], env={"RKV_PROBE_MAX_PRIVATE": "18"})
    assert {violation["violation"] for violation in beyond.probe.violations} == {"private"}


def test_a_run_replaces_every_binding_that_sglang_replaces() -> None:
    log = run_scheduler(flags("--kv-policy", "rkv"), [], env={CHECK_VARIABLE: "1"}).log
    counts = [line.rpartition(": ")[2] for line in log.splitlines() if line.startswith("binding of ")]
    # Most hooks are on methods, which no module holds; some are not.
    assert len(counts) >= 20
    assert any(not count.startswith("0 replaced") for count in counts)
    assert [count for count in counts if not count.endswith(" 0 missed")] == []


def test_refused_flags_surface() -> None:
    with pytest.raises(LauncherRefused, match="unrecognized arguments: --no-such-flag") as caught:
        run_scheduler(flags("--no-such-flag"), [])
    assert caught.value.exit_code == 2


def test_a_failing_scheduler_surfaces_with_its_traceback(rng: random.Random) -> None:
    request = Request(input_ids=random_prompt(rng, 5), sampling_params=greedy(5))
    with pytest.raises(SchedulerFailed, match="Test crash after stream_output") as caught:
        run_scheduler(flags(), [request, request], env={"SGLANG_TEST_CRASH_AFTER_STREAM_OUTPUTS": "1"})
    assert "Traceback (most recent call last)" in caught.value.log
    assert caught.value.exit_code


def test_a_run_that_takes_too_long_ends_with_all_its_processes(rng: random.Random) -> None:
    endless = Request(input_ids=random_prompt(rng, 5), sampling_params=greedy(4000))
    with pytest.raises(TimeoutError, match="took longer"):
        run_scheduler(flags(), [endless], timeout=4)
    zygote = psutil.Process(_Zygote.get()._process.pid)
    deadline = time.monotonic() + 10
    while any(child.status() != psutil.STATUS_ZOMBIE for child in zygote.children(recursive=True)):
        assert time.monotonic() < deadline, zygote.children(recursive=True)
        time.sleep(0.1)


@pytest.mark.server
def test_a_server_that_refuses_is_seen_to_exit() -> None:
    exit_code, output = Server(flags("--no-such-flag")).start_and_expect_exit()
    assert exit_code == 2
    assert "unrecognized arguments: --no-such-flag" in output


@pytest.mark.timeout(30)
def test_a_message_to_a_scheduler_that_has_ended_is_dropped(tmp_path):
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket, socket.bind(f"ipc://{tmp_path}/nobody"):
        connection, _other = multiprocessing.Pipe()
        _Run({"timeout": 20.0}, connection)._send(socket, object())
