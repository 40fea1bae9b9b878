"""Parts of SGLang and of the policy that a scheduler process works on, frozen once they are there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from rkv_sglang.algorithm.model_attention import PLAIN_ATTENTION, ModelAttention
from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.algorithm.rope import Rope
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.prompt_hits import PromptHitsRoom
from rkv_sglang.cache.query_window import QueryWindow
from rkv_sglang.cache.step_tensors import warm_up_step
from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.metrics import PolicyMetrics
from rkv_sglang.integration.runtime.prefixes.named import Prefixes
from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.policy_trial import score_problem
from rkv_sglang.kernels.dispatch import runs_triton
from rkv_sglang.kernels.paged_batch import FP8_DTYPES
from rkv_sglang.kernels.warmup import warm_up
from rkv_sglang.policies import (
    POLICIES,
    Policy,
    keeps_prompt_hits,
    memory_numbers,
    needs_rope,
    needs_statistics,
    observes,
)
from rkv_sglang.sizes.query_rows import num_query_rows

# How much more than what a policy remembers a compaction holds meanwhile.
MEMORY_COPIES = 8

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What scores are made of; there once the KV pool is, and only where the policy looks at keys or queries.

    Attributes:
        buffers: The KV pool, all layers of this rank.
        layers: SGLang's attention layers of it, in their order.
        query_window: The last queries of the requests that are about to be compacted.
        first_layer: The model's number of the pool's first layer.
        attention: How the model attends.
        memory_bytes: What compacting a request takes besides, for a policy that remembers.
        prompt_hits_room: What long prompts found within themselves; none for other policies.
    """

    buffers: KVBuffers
    layers: tuple[Any, ...]
    query_window: QueryWindow
    first_layer: int
    attention: ModelAttention = PLAIN_ATTENTION
    memory_bytes: int = 0
    prompt_hits_room: PromptHitsRoom = field(default_factory=lambda: PromptHitsRoom(is_used=False))

    @property
    def request_bytes(self) -> int:
        """Bytes that compacting a request takes besides what its tokens do."""
        return self.query_window.row_bytes + self.memory_bytes

    def follow_scales(self) -> None:
        """Dequantise an fp8 pool by what its layers say now, on the current stream: new weights bring new factors."""
        if self.buffers.keys.dtype in FP8_DTYPES:
            self.buffers.set_scales(*_scales_of(self.layers))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that the policy works on, there once the scheduler is built.

    Attributes:
        scheduler: SGLang's.
        scored: None where nothing is looked at: no query is recorded then.
        metrics: None where the scheduler reports none.
        attention_window: Tokens that the budget of every request must hold, because some layers attend to the latest
            of them alone; 0 where none does.
        prefixes: The named ones.
    """

    scheduler: Scheduler
    scored: Scored | None
    metrics: PolicyMetrics | None
    attention_window: int = 0
    prefixes: Prefixes = field(default_factory=Prefixes)

    def pool_size_for(self, req: Any) -> int:
        """Return how many slots the pool has for a request and others, that is, without what named prefixes hold."""
        return int(self.scheduler.max_total_num_tokens) - self.prefixes.held_beside(req)

    def timed(self) -> contextlib.AbstractContextManager[None]:
        """Observe how long the work within takes, if the scheduler reports metrics."""
        return contextlib.nullcontext() if self.metrics is None else self.metrics.timed()


def scored_parts(model_runner: ModelRunner, config: PolicyConfig, policy: Policy) -> Scored:
    """Take the KV pool, allocate the query window, and compile what will run on them.

    Call it before CUDA graphs are captured.
    """
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.runtime_context import get_parallel

    modules = (module for module in model_runner.model.modules() if isinstance(module, RadixAttention))
    layers = sorted(modules, key=lambda layer: layer.layer_id)
    pool: Any = model_runner.token_to_kv_pool
    parallel = get_parallel()
    # A checkpoint may bring factors that a pool of 16 bits has no use for.
    no_scales = [1.0] * len(layers)
    key_scales, value_scales = _scales_of(layers) if pool.dtype in FP8_DTYPES else (no_scales, no_scales)
    buffers = KVBuffers.from_layers(
        pool.k_buffer,
        pool.v_buffer,
        dtype=pool.dtype,
        key_scales=key_scales,
        value_scales=value_scales,
        first_layer=pool.start_layer,
        # Ranks that are more than the heads share them.
        first_kv_head=(
            parallel.attn_tp_rank * model_runner.model_config.get_total_num_kv_heads() // parallel.attn_tp_size
        ),
    )
    attention = attention_of(layers, model_runner.model, policy, config.policy)
    refuse_split_observations(policy, config.policy, parallel.attn_tp_size)
    req_to_token = model_runner.req_to_token_pool.req_to_token
    num_requests = req_to_token.shape[0]
    query_window = QueryWindow(
        num_layers=len(layers),
        num_rows=num_query_rows(config, pool.size, num_requests - 1),
        window=config.window,
        num_qo_heads=layers[0].tp_q_head_num,
        head_dim=layers[0].qk_head_dim,
        max_requests=num_requests,
        dtype=model_runner.dtype,
        device=model_runner.device,
    )
    _refuse_strange_scores(policy, config, buffers, query_window, attention)
    warm_up(
        buffers.keys,
        buffers.values,
        query_window.rings,
        query_window.row_of_request,
        policy,
        budget=config.budget,
        capacity=config.capacity,
        model=attention,
    )
    if runs_triton(buffers.keys):
        warm_up_step(query_window, req_to_token)
    group_size = layers[0].tp_q_head_num // layers[0].tp_k_head_num
    numbers = memory_numbers(policy, group_size, layers[0].qk_head_dim) * len(layers) * layers[0].tp_k_head_num
    return Scored(
        buffers=buffers,
        layers=tuple(layers),
        query_window=query_window,
        first_layer=pool.start_layer,
        attention=attention,
        # What is remembered, in fp32, and some copies of it and of the window's queries, turned and not.
        memory_bytes=MEMORY_COPIES * 4 * numbers,
        prompt_hits_room=PromptHitsRoom(is_used=keeps_prompt_hits(policy)),
    )


def refuse_split_observations(policy: Policy, name: str, num_ranks: int) -> None:
    """Raise ``RefusedError``, one line, if a policy is to decide for all heads where no rank has them all."""
    if observes(policy) and num_ranks > 1:
        raise RefusedError(
            f"--kv-policy {name} cannot be used with {num_ranks} tensor-parallel ranks: what it decides for all layers "
            "it would decide on each rank by the KV heads of that rank; set --tp-size 1 or choose another --kv-policy"
        )


def _scales_of(layers: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Return what keys and what values of an fp8 pool are multiplied with, of each layer."""
    return [layer.k_scale_float or 1.0 for layer in layers], [layer.v_scale_float or 1.0 for layer in layers]


def attention_of(layers: Sequence[Any], model: Any, policy: Policy, name: str) -> ModelAttention:
    """Return how a model attends, from its attention layers; whether they are alike is for ``refuse_runtime`` to say.

    What only some policies need is there for those only; of statistics of the queries, the room for them. ``name`` is
    the policy's.
    """
    attention = ModelAttention(
        logit_scale=float(layers[0].scaling),
        logit_cap=float(layers[0].logit_cap or 0.0),
        sliding_layers=frozenset(layer.layer_id for layer in layers if layer.sliding_window_size > 0),
    )
    if not needs_rope(policy):
        return attention
    rope = rope_of(model, name)
    if not needs_statistics(policy):
        return replace(attention, rope=rope)
    shape = (len(layers), layers[0].tp_q_head_num, rope.num_pairs)
    device = next(model.parameters()).device
    # What a warm-up needs; the calibration puts the numbers in.
    nothing = QueryStatistics(
        torch.zeros(shape, dtype=torch.complex64, device=device), torch.zeros(shape, device=device)
    )
    return replace(attention, rope=rope, statistics=nothing)


def rope_of(model: Any, policy: str) -> Rope:
    """Return how positions turn queries and keys; ``policy`` is the name of the one that asks.

    Raises:
        RefusedError: They do it in a way that is not known here, or in different ways.
    """
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding
    from sglang.srt.layers.rotary_embedding.yarn import YaRNScalingRotaryEmbedding

    num_layers = sum(isinstance(module, RadixAttention) for module in model.modules())
    embeddings = [
        module.rotary_emb
        for module in model.modules()
        if isinstance(getattr(module, "attn", None), RadixAttention) and hasattr(module, "rotary_emb")
    ]
    ropes = set()
    for embedding in embeddings:
        if type(embedding) in (RotaryEmbedding, Llama3RotaryEmbedding):
            inv_freqs, factor = embedding._compute_inv_freq(embedding.base), 1.0
        elif type(embedding) is YaRNScalingRotaryEmbedding:
            inv_freqs, factor = embedding._compute_inv_freq(embedding.scaling_factor), float(embedding.mscale)
        else:
            raise RefusedError(
                f"--kv-policy {policy} cannot be used with this model: its positions are turned by "
                f"{type(embedding).__name__}, which is not known here; serve it with another --kv-policy"
            )
        ropes.add(Rope(inv_freqs=tuple(inv_freqs.tolist()), factor=factor, is_neox=bool(embedding.is_neox_style)))
    if len(embeddings) != num_layers or len(ropes) != 1:
        raise RefusedError(
            f"--kv-policy {policy} cannot be used with this model: of {num_layers} attention layers "
            f"{len(embeddings)} turn queries by their position, in {len(ropes)} ways; serve it with another --kv-policy"
        )
    return ropes.pop()


def _refuse_strange_scores(
    policy: Policy, config: PolicyConfig, buffers: KVBuffers, query_window: QueryWindow, attention: ModelAttention
) -> None:
    """Refuse a policy of another package whose scores are none; those of this one have their tests."""
    if type(policy) in POLICIES.values():
        return
    keys, (_, _, _, num_qo_heads, head_dim) = buffers.keys, query_window.rings.shape
    problem = score_problem(
        policy,
        window=config.window,
        budget=config.budget,
        capacity=config.capacity,
        num_qo_heads=num_qo_heads,
        num_kv_heads=keys.num_kv_heads,
        head_dim=head_dim,
        v_head_dim=buffers.values.head_dim,
        model=attention,
        device=keys.device,
    )
    if problem is not None:
        raise RefusedError(f"--kv-policy {config.policy} cannot be served: {problem}; mend or uninstall its package")
