"""What the dense oracle answers to a fuzzed request."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from devtools.tiny_models import EOS_ID, tiny_model_path
from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.lengths import RequestState
from rkv_sglang.sizes.reservation import prompt_budget_after
from tests.e2e.workload import Setting
from tests.fuzz.runner import policy_parameters
from tests.fuzz.schedule import FP8_SCALES, FuzzRequest, ServerConfig
from tests.support.oracle.decoder import Fp8
from tests.support.oracle.dense import DenseResult, dense_generate
from tests.support.oracle.penalties import adjustment

NEVER = 10**6
FP8_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def expected_of(
    server: ServerConfig,
    request: FuzzRequest,
    prompt: list[int],
    limit: int,
    retractions: list[Any],
    *,
    guess: Sequence[int] = (),
) -> DenseResult:
    """Return what the dense oracle answers that is preempted where the request was; a right ``guess`` saves time."""
    setting = Setting(
        budget=request.budget or server.budget,
        buffer=request.buffer or server.buffer,
        window=server.window,
        policy=server.policy,
        block=server.block,
    )
    # SGLang takes either as an end, or neither.
    stop_token_ids = {EOS_ID, *request.params.get("stop_token_ids", ())}
    recomputed = {place["outputs"] for place in retractions if not place["copied"]} - {0}
    restored = [place for place in retractions if place["copied"] and place["outputs"] not in recomputed]
    prompt_budget = server.prompt_budget if request.prompt_budget is None else request.prompt_budget
    own = PolicyConfig(
        policy=server.policy,
        budget=setting.budget,
        buffer=setting.buffer,
        window=setting.window,
        prompt_budget=prompt_budget,
        granularity=server.granularity,
        block=server.block or 1,
    )
    fits = partial(prompt_budget_after, own, RequestState(len(prompt), request.max_new_tokens))
    # The pool does not hold their prompt and what would stay of it.
    whole = {after for after in {0, *recomputed} if not fits(len(prompt) + after, server.pool, server.page_size)}
    may_stagger = server.stagger and request.max_new_tokens - 1 > setting.budget + setting.buffer
    return dense_generate(
        tiny_model_path(server.model),
        prompt,
        limit,
        budget=NEVER if request.no_policy else setting.budget,
        buffer=setting.buffer,
        window=setting.window,
        score=partial(setting.score, **policy_parameters(server)),
        block=setting.block,
        adjust=adjustment(request.params, prompt, stop_token_ids, lag=int(server.overlap)),
        eos_token_ids=set() if request.ignore_eos else stop_token_ids,
        recompute_at=recomputed,
        restore_at={place["outputs"] for place in restored},
        restored_in_flight={place["outputs"] for place in restored if place["in_flight"]},
        evicted_at_restore={place["outputs"]: place["evicted"] for place in restored},
        early=setting.early if may_stagger and not request.no_policy else None,
        guessed_output_ids=guess,
        prompt_budget=None if request.no_policy else prompt_budget or None,
        whole_prompt_after=whole,
        fp8=Fp8(FP8_DTYPES[server.kv_dtype], FP8_SCALES) if server.kv_dtype in FP8_DTYPES else None,
    )
