"""Questions to a model, and its answers, shown to a meter.

Each answer is generated greedily with the full cache; then question and answer are computed once more as one prompt,
during which every layer's queries and keys are seen with their positions, in a fixed order.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import torch

from rkv_sglang.integration.startup.calibration_prompts import PROMPTS
from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.meters.meter import Meter, Metered

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

MEND = "serve it with another --kv-policy"


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
def measure(scheduler: Scheduler, name: str, meter: Meter, runtime: Metered) -> None:
    """Show the meter the model's answers to the policy's questions; ``name`` is the policy's."""
    from sglang.srt.runtime_context import get_parallel

    if (num_ranks := get_parallel().attn_dp_size) > 1:
        raise RefusedError(
            f"--kv-policy {name} cannot measure queries with --attn-dp-size {num_ranks}, where no rank runs "
            "alone: name a file of an earlier start by --kv-policy-config '{\"statistics\": ...}'"
        )
    policy = runtime.policy
    questions = _questions(policy)
    longest = max(map(len, questions))
    num_new = min(policy.answer_tokens, scheduler.model_config.context_len - longest - 1)
    # A page more for each, since none is shared.
    room = scheduler.max_total_num_tokens // (longest + num_new + 2 * scheduler.page_size)
    at_once = min(room, scheduler.max_running_requests, len(questions))
    if num_new < 1 or at_once < 1:
        raise RefusedError(
            f"--kv-policy {name} measures answers of {policy.answer_tokens} tokens, and the context of "
            f"{scheduler.model_config.context_len} tokens or the KV pool of {scheduler.max_total_num_tokens} holds "
            "none; set answer_tokens lower with --kv-policy-config"
        )
    num_tokens = 0
    for first in range(0, len(questions), at_once):
        asked = questions[first : first + at_once]
        for question, answer in zip(asked, _generate(scheduler, asked, num_new), strict=True):
            meter.start(len(question))
            runtime.meter = meter
            _prefill(scheduler, [question + answer])
            runtime.meter = None
            _clear(scheduler)
            num_tokens += len(question) + len(answer)
    counts = meter.counts.values()
    if set(counts) != {num_tokens}:
        raise RefusedError(
            f"--kv-policy {name} saw the queries of {min(counts)} to {max(counts)} of {num_tokens} "
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
