"""Count how often each kernel is compiled by the warm-up and then by batches of other sizes, with no GPU here.

Every launch compiles for sm_90 what a GPU would be given, and launches nothing. Prints the counts as JSON, a line for
each case: those after the warm-up and those at the end. Triton's interpreter must be off.

    python -m tests.kernels.count_variants POLICY[,HEAD_DIM,WINDOW,NUM_KV_HEADS,GROUP_SIZE] ...
"""

import json
import os
import random
import sys
import traceback
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from rkv_sglang.cache import prompt
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest
from rkv_sglang.config import PolicyConfig
from rkv_sglang.kernels import capture, dispatch, move, select, warmup
from rkv_sglang.kernels.paged_batch import PagedBatch, PagedBuffers
from rkv_sglang.kernels.score import key_passes, mean_keys, scan, totals, values
from rkv_sglang.kernels.score.per_head import (
    beaconkv,
    block_means,
    farthest,
    gkv,
    half,
    representatives,
    triattention,
)
from rkv_sglang.policies import make_policy
from rkv_sglang.sizes.prompt_plan import PromptPlan
from tests.policies.cases import model_with_statistics

LLAMA_8B = (128, 8, 8, 4)
# The last launch of query capture then has fewer layers than the others.
NUM_LAYERS = capture.LAYERS_PER_LAUNCH + 2


class AbsentGpu:
    """As much of a driver as compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def kernel_counts() -> dict[str, int]:
    """Return how many variants of each kernel were compiled."""
    modules = (capture, move, select, key_passes, mean_keys, scan, totals, values)
    modules += (beaconkv, block_means, farthest, gkv, half, representatives, triattention)
    kernels = {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    return {name: len(kernel.device_caches[0][0]) for name, kernel in kernels.items()}


def main() -> None:
    """Run from the command line: each case in a fork, where nothing is compiled yet."""
    for case in sys.argv[1:]:
        policy, *shape = case.split(",")
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps(counts_of(policy, tuple(map(int, shape)) or LLAMA_8B)), flush=True)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(f"the case {case} failed")


def counts_of(policy_name: str, shape: tuple[int, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the counts after the warm-up and at the end."""
    launch = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(kernel, *args, grid=grid, warmup=True, **kwargs)

    driver.set_active(AbsentGpu())
    JITFunction.run = compile_only
    dispatch.runs_triton = warmup.runs_triton = prompt.runs_triton = lambda buffers: True
    prompt._best_torch = prompt._best_paged
    torch.cuda.synchronize = lambda device: None

    rng = random.Random(0)
    head_dim, window, num_kv_heads, group_size = shape
    policy = make_policy(PolicyConfig(policy=policy_name, window=window))
    keys, values = (
        PagedBuffers.from_tensors([torch.zeros(64, num_kv_heads, head_dim).bfloat16() for _ in range(NUM_LAYERS)])
        for _ in "kv"
    )
    num_qo_heads = num_kv_heads * group_size
    model = model_with_statistics(NUM_LAYERS, num_qo_heads, head_dim)
    rings = torch.zeros(NUM_LAYERS, 4, window, num_qo_heads, head_dim).bfloat16()
    row_of_request = torch.zeros(9, dtype=torch.int64)
    warmup.warm_up(keys, values, rings, row_of_request, policy, budget=1024, capacity=1152, model=model)
    after_warm_up = kernel_counts()
    for num_requests in (1, 2, 3, 4, 16, 17):
        kv_lens = [rng.randint(100, 250) for _ in range(num_requests)]
        batch = PagedBatch.from_slots(
            # Views that start anywhere, as a part of a larger tensor may.
            torch.zeros(sum(kv_lens) + 1, dtype=torch.int64)[1:],
            kv_lens=kv_lens,
            prompt_lens=[rng.randint(0, 20) for _ in kv_lens],
            budgets=[rng.randint(10, 70) for _ in kv_lens],
            window=window,
        )
        queries = rings.new_zeros(NUM_LAYERS, num_requests, window, num_qo_heads, head_dim)
        dispatch.compact_paged(keys, values, batch, queries, policy, model=model)
        some = slice(1, 4)
        part = KVBuffers(keys=keys, values=values).of_layers(some)
        dispatch.compact_paged(part.keys, part.values, batch, queries[some].clone(), policy, model=model)
        plans = [PromptPlan(kv_len, kv_len + rng.randint(1, 30), rng.randint(30, 70)) for kv_len in kv_lens]
        slots = torch.zeros(300, dtype=torch.int64)
        prompt.compact_prompts(
            KVBuffers(keys=keys, values=values),
            [DueRequest(plan, slots[1 : plan.resident_len + 1], plan.resident_len) for plan in plans],
            [slots[1 : plan.kept_len + 1] for plan in plans],
            lambda part, layers, queries=queries: queries[layers, part],
            policy,
            window,
            model=model,
        )
        indices = row_of_request.new_zeros(num_requests + 1)[1:]
        step_queries = rings.new_zeros(num_requests, num_qo_heads * head_dim)
        for some in rings.split(capture.LAYERS_PER_LAUNCH):
            capture.capture_queries(some, row_of_request, [step_queries] * len(some), indices, indices)
    return after_warm_up, kernel_counts()


if __name__ == "__main__":
    main()
