"""What the dense oracle answers to a fuzzed request."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from devtools.tiny_models import EOS_ID, tiny_model_path
from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.lengths import RequestState
from rkv_sglang.sizes.reservation import prompt_budget_after
from tests.e2e.workload import Setting
from tests.fuzz.draw.images import image_of
from tests.fuzz.runner import policy_parameters
from tests.fuzz.schedule import FuzzRequest
from tests.fuzz.server import FP8_SCALES, ServerConfig
from tests.support.oracle.decoder import Fp8
from tests.support.oracle.dense import DenseResult, Prefix, dense_generate, dense_prefix
from tests.support.oracle.judges import judged_by
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
    maker: FuzzRequest | None = None,
    pool: int | None = None,
    prompt_len: int | None = None,
) -> DenseResult:
    """Return what the dense oracle answers that is preempted where the request was.

    Args:
        guess: A right one saves time.
        maker: Who made the named prefix that the request goes on from.
        pool: What the pool has beside named prefixes, where that is not all.
        prompt_len: Tokens that are its prompt, where the others are an answer that came back.
    """
    marked, carried = prompt[:prompt_len], [] if prompt_len is None else prompt[prompt_len:]
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
    prompt_budget = request.kept_of_prompt(server)
    own = PolicyConfig(
        policy=server.policy,
        budget=setting.budget,
        buffer=setting.buffer,
        window=setting.window,
        prompt_budget=prompt_budget,
        granularity=server.granularity,
        block=server.block or 1,
    )
    fits = partial(prompt_budget_after, own, RequestState(len(marked), len(carried) + request.max_new_tokens))
    # The pool does not hold their prompt and what would stay of it.
    pool = server.pool if pool is None else pool
    whole = {after for after in {0, *recomputed} if not fits(len(prompt) + after, pool, server.page_size)}
    stand_ins = () if maker is None else maker.prompt[: maker.prefix["budget"]]
    most = len(carried) + request.max_new_tokens
    may_stagger = server.stagger and most - 1 > setting.budget + setting.buffer
    return dense_generate(
        tiny_model_path(server.model),
        marked,
        limit,
        carried_ids=carried,
        budget=NEVER if request.no_policy else setting.budget,
        buffer=setting.buffer,
        window=setting.window,
        score=partial(setting.score, **policy_parameters(server)),
        block=setting.block,
        # Penalties and limits count from here, whatever came back.
        adjust=adjustment(request.params, prompt, stop_token_ids, lag=int(server.overlap)),
        eos_token_ids=set() if request.ignore_eos else stop_token_ids,
        recompute_at=recomputed,
        restore_at={place["outputs"] for place in restored},
        restored_in_flight={place["outputs"] for place in restored if place["in_flight"]},
        evicted_at_restore={place["outputs"]: place["evicted"] for place in restored},
        # The tokens that stand for a prefix are the first of its document.
        early=partial(_early, setting, stand_ins) if may_stagger and not request.no_policy else None,
        guessed_output_ids=guess,
        prompt_budget=prompt_budget or None,
        whole_prompt_after=whole,
        fp8=_fp8(server),
        prefix=None if maker is None else prefix_of(server, maker),
        image=image_of(request),
    )


def kinds_of_marked(request: FuzzRequest, num_carried: int, retractions: list[Any], expected: DenseResult) -> list[str]:
    """Return what is to be counted of an answer to a request that marks its prompt."""
    if request.marked is None:
        return []
    of = (
        ("", True),
        (" follow-ups", request.continues),
        (", something came back", num_carried > 0),
        (", compacted", num_carried > 0 and bool(expected.compactions)),
        (", preempted", num_carried > 0 and bool(retractions)),
        (", restored", num_carried > 0 and any(place["copied"] for place in retractions)),
    )
    return [f"marked{name}" for name, is_so in of if is_so]


def prefix_of(server: ServerConfig, maker: FuzzRequest) -> Prefix:
    """Return what is left of the document of a request that makes a named prefix."""
    made = maker.made
    return _prefix_of(server, maker.prompt, made["length"], made["budget"], made["judge"])


@lru_cache(maxsize=64)
def _prefix_of(server: ServerConfig, ids: tuple[int, ...], length: int, budget: int, judge: str) -> Prefix:
    own = Setting(server.budget, server.buffer, policy=server.policy, block=server.block).score
    policy = partial(own, **policy_parameters(server))
    return dense_prefix(
        tiny_model_path(server.model),
        *(ids[:length], ids[length:], budget),
        window=server.window,
        fp8=_fp8(server),
        block=server.block,
        **judged_by(judge, policy, length=length, num_behind=len(ids) - length),
    )


def _early(setting: Setting, stand_ins: tuple[int, ...], prompt: Sequence[int], outputs: Sequence[int]) -> int:
    return setting.early([*stand_ins, *prompt], outputs)


def _fp8(server: ServerConfig) -> Fp8 | None:
    return Fp8(FP8_DTYPES[server.kv_dtype], FP8_SCALES) if server.kv_dtype in FP8_DTYPES else None
