"""What the real scheduler answers and does, step by step, under a few settings: to be compared between SGLangs.

python -m tests.environments.answers FILE [SETTING ...]   with the SGLang that Python finds, as JSON
"""

import dataclasses
import json
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sglang

from devtools.tiny_models import tiny_model_path
from rkv_sglang.integration.hooking.hook import Hook
from rkv_sglang.integration.hooks.admission import ADMISSION_HOOKS
from rkv_sglang.integration.hooks.answers import STREAMER_HOOKS
from rkv_sglang.integration.hooks.metrics import METRICS_HOOKS
from rkv_sglang.integration.hooks.model import CAPTURE_HOOKS, MODEL_HOOKS
from rkv_sglang.integration.hooks.native import without_native
from rkv_sglang.integration.hooks.restore import RESTORE_HOOKS
from rkv_sglang.integration.hooks.scheduler import SCHEDULER_HOOKS
from tests.e2e.workload import Setting, greedy, random_ids, retracting, six_prompts
from tests.support.harness.scheduler import Request, RunResult, run_scheduler

NUM_TOKENS = 150
HEAD = Setting(budget=37, buffer=23)
SMALL = Setting(budget=24, buffer=16)
BLOCKS = Setting(budget=48, buffer=32, policy="random_attention", block=16)
MODEL = tiny_model_path("llama-gqa")
FLAGS = ["--model-path", str(MODEL)]
# Of a scheduler with a policy; what the launcher hooks is the same in every SGLang.
HOOKS = (*MODEL_HOOKS, *ADMISSION_HOOKS, *RESTORE_HOOKS, *SCHEDULER_HOOKS, *STREAMER_HOOKS, *METRICS_HOOKS)


def _mixed(num_tokens: int) -> list[Request]:
    """Greedy and seeded requests, with and without log-probabilities."""
    requests = [greedy(prompt, num_tokens, return_logprob=i % 2 == 0) for i, prompt in enumerate(six_prompts())]
    for i, request in enumerate(requests[3:]):
        request.sampling_params.update(temperature=0.8, top_p=0.95, sampling_seed=11 + i)
    return requests


def _plain() -> RunResult:
    return run_scheduler([*FLAGS, *HEAD.flags], _mixed(NUM_TOKENS))


def _crowded() -> RunResult:
    """More than fits at once, so that admission decides who runs when."""
    rng = random.Random(3)
    requests = [greedy(random_ids(rng, rng.randrange(8, 40)), rng.randrange(20, 110)) for _ in range(24)]
    pool = ["--max-total-tokens", "400", "--page-size", "16", "--chunked-prefill-size", "32"]
    return run_scheduler([*FLAGS, *pool, *SMALL.flags], requests)


def _restored() -> RunResult:
    """Requests that are preempted, and come back with what they kept or are computed again."""
    requests = [greedy(prompt, 320, return_logprob=True) for prompt in six_prompts()[:3]]
    requests[1].sampling_params.update(temperature=0.8, sampling_seed=5)
    return run_scheduler([*FLAGS, "--max-total-tokens", "330", *SMALL.flags], requests, env=retracting(71))


def _blocks() -> RunResult:
    return run_scheduler([*FLAGS, "--page-size", "16", *BLOCKS.flags], _mixed(NUM_TOKENS))


def _off() -> RunResult:
    return run_scheduler([*FLAGS, "--max-total-tokens", "700"], _mixed(NUM_TOKENS), env=retracting(41))


RUNS: dict[str, Callable[[], RunResult]] = {
    "plain": _plain,
    "crowded": _crowded,
    "restored": _restored,
    "blocks": _blocks,
    "off": _off,
}


def expected_hooks(name: str, capabilities: frozenset[str]) -> set[str]:
    """Return the functions of a scheduler that must be hooked in one of the runs, and no others may."""
    if name == "off":
        return set()
    hooks: tuple[Hook, ...] = HOOKS if name == "blocks" else (*HOOKS, *CAPTURE_HOOKS)
    return {hook.target for hook in without_native(hooks, capabilities)}


def hooked_in(log: str) -> set[str]:
    """Return the functions on which this package put a hook of a scheduler's, as SGLang's own log has it."""
    applied = {line.split(" to ")[1].split(" ")[0] for line in log.splitlines() if _APPLIED.search(line)}
    return applied & {hook.target for hook in (*HOOKS, *CAPTURE_HOOKS)}


_APPLIED = re.compile(r"Applied \d+ hook\(s\) to .*rkv_sglang")


def record(name: str) -> dict[str, Any]:
    """Run one setting; return its answers, every step of the scheduler with all lengths and counts, and its hooks."""
    started = time.monotonic()
    result = RUNS[name]()
    result.assert_clean()
    return {
        "answers": [dataclasses.asdict(output) for output in result.outputs],
        "schedule": from_first_step(result.probe.events),
        "hooked": sorted(hooked_in(result.log)),
        "seconds": round(time.monotonic() - started, 1),
    }


def from_first_step(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count steps from the first that ran something: until all requests are there, an idle scheduler counts on."""
    first = next(event["step"] for event in events if event["event"] == "step")
    return [{**event, "step": event["step"] - first} for event in events if event.get("step", 0) >= first]


def main(argv: list[str]) -> int:
    """Record some settings, or all; returns the exit status."""
    file, *names = argv
    runs = {name: record(name) for name in names or RUNS}
    Path(file).write_text(json.dumps({"sglang": str(Path(sglang.__file__).parent), "runs": runs}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
