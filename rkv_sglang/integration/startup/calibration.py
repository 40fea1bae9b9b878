"""Calibration: before a server is ready, the model answers questions, and its usual queries are measured.

Each answer is generated greedily with the full cache; then question and answer are computed once more as one prompt,
during which every layer's queries are seen with their positions. Sums are in fp64 and in a fixed order, so two starts
on one machine measure the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.algorithm.rope import Rope
from rkv_sglang.cache.statistics_file import load_statistics, save_statistics
from rkv_sglang.integration.startup.calibration_prompts import PROMPTS
from rkv_sglang.integration.startup.errors import RefusedError

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Elements of each weight that tell one model from another.
SAMPLED_ELEMENTS = 64
MEND = "serve it with another --kv-policy"


class QueryMeter:
    """Sums of queries that were turned back to position 0."""

    def __init__(self, rope: Rope, num_layers: int, num_qo_heads: int, device: torch.device | str) -> None:
        self.rope = rope
        self.counts = [0] * num_layers
        shape = (num_layers, num_qo_heads, rope.num_pairs)
        self._sums = torch.zeros(shape, dtype=torch.complex128, device=device)
        self._lengths = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, layer: int, queries: torch.Tensor, positions: torch.Tensor) -> None:
        """Count one layer's queries after RoPE, ``[num_tokens, num_qo_heads * head_dim]``, by their positions."""
        num_tokens = len(positions)
        pairs = self.rope.pairs(queries[:num_tokens].reshape(num_tokens, self._sums.shape[1], -1))
        turned_back = self.rope.turns(positions.tolist()).conj().to(queries.device)
        pairs = pairs.to(torch.complex128) * turned_back[:, None] / self.rope.factor
        self._sums[layer] += pairs.sum(dim=0)
        self._lengths[layer] += pairs.abs().sum(dim=0)
        self.counts[layer] += num_tokens

    def statistics(self) -> QueryStatistics:
        """Return the means so far."""
        counts = torch.tensor(self.counts, dtype=torch.float64, device=self._lengths.device)[:, None, None]
        return QueryStatistics((self._sums / counts).to(torch.complex64), (self._lengths / counts).float())


class Metered(Protocol):
    """Whatever passes queries on to its meter, while it has one."""

    policy: Any
    meter: QueryMeter | None


def calibrated(attention: ModelAttention, scheduler: Scheduler, runtime: Metered) -> ModelAttention:
    """Return how the model attends, with statistics of its queries if the policy needs them.

    Raises:
        RefusedError: A file does not fit, or nothing can be measured; one line.
    """
    if attention.rope is None or attention.statistics is None:
        return attention
    num_layers, num_qo_heads, _ = attention.statistics.means.shape
    meter = QueryMeter(attention.rope, num_layers, num_qo_heads, attention.statistics.means.device)

    def observe(on: bool) -> None:
        runtime.meter = meter if on else None

    return replace(attention, statistics=_statistics_for(scheduler, meter, observe, runtime.policy))


def _statistics_for(
    scheduler: Scheduler, meter: QueryMeter, observe: Callable[[bool], None], policy: Any
) -> QueryStatistics:
    """Return the model's statistics: from the named file, from that of an earlier start, or measured now and kept.

    Args:
        meter: Counts the queries.
        observe: Called with True before the queries to count are computed, and with False behind them.
        policy: The policy, a ``TriAttention``.

    Raises:
        RefusedError: The file does not fit, or nothing can be measured; one line.
    """
    made_from = _made_from(scheduler, meter.rope, policy)
    named = Path(os.path.expanduser(policy.statistics)) if policy.statistics else None
    own_name = "-".join([made_from["model"][:16], made_from["questions"], made_from["rank"]])
    path = named or _cache_folder() / f"{own_name}.safetensors"
    try:
        if named is not None or os.path.exists(path):
            return load_statistics(path, made_from, scheduler.device)
    except ValueError as error:
        mend = "name another file by" if named is not None else "delete it, or name a file by"
        raise RefusedError(f"{error}; {mend} --kv-policy-config '{{\"statistics\": ...}}', or leave it out") from None
    logger.info("KV policy triattention: measuring the model's queries, once; they will be in %s", path)
    _measure(scheduler, meter, observe, policy)
    statistics = meter.statistics()
    try:
        save_statistics(path, statistics, made_from)
    except OSError as error:
        logger.warning("KV policy triattention: %s cannot be written (%s); the next start measures again", path, error)
    return statistics


def _cache_folder() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "rkv_sglang", "query_statistics")


def _made_from(scheduler: Scheduler, rope: Rope, policy: Any) -> dict[str, str]:
    """Return what statistics depend on, by name."""
    from sglang.srt.runtime_context import get_parallel

    model_runner = scheduler.tp_worker.model_runner
    digest = hashlib.sha256(repr(rope).encode())
    for name, weight in sorted(model_runner.model.named_parameters()):
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(SAMPLED_ELEMENTS, len(flat)), device=flat.device).long()
        digest.update(f"{name} {list(weight.shape)} {flat[places].double().tolist()}".encode())
    parallel = get_parallel()
    return {
        "model": digest.hexdigest(),
        "questions": f"{policy.questions}x{policy.answer_tokens}",
        "rank": f"{parallel.attn_tp_rank}of{parallel.attn_tp_size}",
    }


def _questions(policy: Any) -> list[list[int]]:
    """Return the questions as the model's chat template puts them, if it has one."""
    tokenizer = _tokenizer()
    prompts = PROMPTS[: policy.questions]
    if not getattr(tokenizer, "chat_template", None):
        return [list(tokenizer.encode(prompt)) for prompt in prompts]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    return [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def _tokenizer() -> Any:
    # A scheduler may have none of its own, where requests come as tokens.
    from sglang.srt.runtime_context import get_model, get_serving
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    serving = get_serving()
    return get_tokenizer(
        serving.tokenizer_path,
        tokenizer_mode=serving.tokenizer_mode,
        trust_remote_code=get_model().trust_remote_code,
        revision=get_model().revision,
        tokenizer_backend=serving.tokenizer_backend,
    )


@torch.no_grad()
def _measure(scheduler: Scheduler, meter: QueryMeter, observe: Callable[[bool], None], policy: Any) -> None:
    from sglang.srt.runtime_context import get_parallel

    if (num_ranks := get_parallel().attn_dp_size) > 1:
        raise RefusedError(
            f"--kv-policy triattention cannot measure queries with --attn-dp-size {num_ranks}, where no rank runs "
            "alone: name a file of an earlier start by --kv-policy-config '{\"statistics\": ...}'"
        )
    questions = _questions(policy)
    longest = max(map(len, questions))
    num_new = min(policy.answer_tokens, scheduler.model_config.context_len - longest - 1)
    # A page more for each, since none is shared.
    room = scheduler.max_total_num_tokens // (longest + num_new + 2 * scheduler.page_size)
    at_once = min(room, scheduler.max_running_requests, len(questions))
    if num_new < 1 or at_once < 1:
        raise RefusedError(
            f"--kv-policy triattention measures answers of {policy.answer_tokens} tokens, and the context of "
            f"{scheduler.model_config.context_len} tokens or the KV pool of {scheduler.max_total_num_tokens} holds "
            "none; set answer_tokens lower with --kv-policy-config"
        )
    num_tokens = 0
    for first in range(0, len(questions), at_once):
        asked = questions[first : first + at_once]
        for question, answer in zip(asked, _generate(scheduler, asked, num_new), strict=True):
            observe(True)
            _prefill(scheduler, [question + answer])
            observe(False)
            _clear(scheduler)
            num_tokens += len(question) + len(answer)
    if set(meter.counts) != {num_tokens}:
        raise RefusedError(
            f"--kv-policy triattention saw the queries of {min(meter.counts)} to {max(meter.counts)} of {num_tokens} "
            f"tokens, as if prompts ran in a graph; leave prefill graphs off, or {MEND}"
        )


def _generate(scheduler: Scheduler, questions: list[list[int]], num_new: int) -> list[list[int]]:
    """Return greedy answers of ``num_new`` tokens, whatever their end."""
    batch, next_ids = _prefill(scheduler, questions)
    answers = [next_ids]
    for _ in range(num_new - 1):
        batch.input_ids = next_ids
        batch.prepare_for_decode()
        next_ids = _forward(scheduler, batch)
        answers.append(next_ids)
    _clear(scheduler)
    return [list(answer) for answer in torch.stack(answers, dim=1).tolist()]


def _prefill(scheduler: Scheduler, prompts: list[list[int]]) -> tuple[Any, torch.Tensor]:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    reqs = []
    for i, prompt in enumerate(prompts):
        ids = array("q", prompt)
        req = Req(
            rid=f"calibration-{i}",
            origin_input_text="",
            origin_input_ids=ids,
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        )
        req.full_untruncated_fill_ids = ids
        req.logprob_start_len = -1
        req.extend_end = len(ids)
        reqs.append(req)
    batch = ScheduleBatch.init_new(
        reqs=reqs,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        model_config=scheduler.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    if batch.input_ids is None:
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
    return batch, _forward(scheduler, batch)


def _forward(scheduler: Scheduler, batch: Any) -> torch.Tensor:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    model_runner = scheduler.tp_worker.model_runner
    forward_batch = ForwardBatch.init_new(batch, model_runner, return_hidden_states_before_norm=False)
    output = model_runner.forward(forward_batch).logits_output
    next_ids: torch.Tensor = output.next_token_logits.argmax(dim=-1)
    return next_ids


def _clear(scheduler: Scheduler) -> None:
    """Give everything back; nothing of this is left in the radix cache."""
    scheduler.req_to_token_pool.clear()
    scheduler.token_to_kv_pool_allocator.clear()
    scheduler.tree_cache.reset()
