"""Hooks on the model's side: sizing, buffers, query capture, positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import (
    ATTENTION,
    BATCH,
    FORWARD_BATCH,
    FORWARD_MODE,
    KV_POOL,
    MODEL_CONFIG,
    MODEL_RUNNER,
    PARALLEL,
    ROWS,
    RUNTIME_CONTEXT,
)
from rkv_sglang.integration.runtime.current import get_runtime
from rkv_sglang.integration.runtime.prefixes.making import see_tasks
from rkv_sglang.integration.runtime.restore import add_evicted_tokens
from rkv_sglang.policies import is_stateful, keeps_prompt_hits, memory_numbers, needs_statistics, observed_numbers
from rkv_sglang.sizes.memory_plan import ModelShape


def leave_room_for_side_buffers(profile: Callable[..., int], configurator: Any, pre_model_load_memory: int) -> int:
    """Take the share of the policy's own buffers off the bytes that become the KV pool."""
    from sglang.srt.runtime_context import get_parallel

    available_bytes = profile(configurator, pre_model_load_memory)
    runtime = get_runtime()
    if runtime.looks_at_nothing:
        return available_bytes
    # Ranks of data-parallel attention have all heads each.
    model, tp_size = configurator.model_config, get_parallel().attn_tp_size
    shape = ModelShape(
        num_layers=model.num_hidden_layers,
        num_qo_heads=model.num_attention_heads // tp_size,
        num_kv_heads=model.get_num_kv_heads(tp_size),
        head_dim=model.head_dim,
        v_head_dim=model.v_head_dim,
        kv_itemsize=torch.empty(0, dtype=configurator.kv_cache_dtype).element_size(),
        query_itemsize=model.dtype.itemsize,
    )
    numbers = memory_numbers(runtime.policy, shape.num_qo_heads // shape.num_kv_heads, shape.head_dim)
    side_bytes = shape.side_bytes(
        runtime.config,
        stateful=is_stateful(runtime.policy),
        memory_numbers=numbers,
        observed_numbers=observed_numbers(runtime.policy, runtime.config.budget, runtime.config.window),
        prompt_hits=keeps_prompt_hits(runtime.policy),
    )
    if needs_statistics(runtime.policy):
        available_bytes -= shape.statistics_bytes
    return int(available_bytes * shape.kv_bytes / (shape.kv_bytes + side_bytes))


def bind_model_runner(_: None, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """Allocate the query window once the pools exist and before any graph is captured."""
    get_runtime().bind_model_runner(model_runner)


def record_queries(layer: Any, q: Any, k: Any, v: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """Store the queries of a decode step, or look at those of a prompt; they are after q/k-norm and RoPE here."""
    runtime = get_runtime()
    if forward_batch.forward_mode.is_decode():
        runtime.record_queries(layer.layer_id, q, forward_batch)
    elif runtime.meter is not None:
        runtime.meter.add(layer.layer_id, q, k, forward_batch.positions)
    elif runtime.is_bound and runtime.parts.prefixes.in_making:
        see_tasks(runtime.parts, layer.layer_id, q, forward_batch)


def use_logical_positions(result: Any, _: type, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Count positions by every token ever seen, not by those still resident."""
    if result.forward_mode.is_decode():
        from sglang.srt.model_executor.forward_batch_info import clamp_position

        resident = result.positions
        # As int64, as ForwardBatch.init_new itself calls it: on a GPU a kernel is built for each dtype.
        result.positions = clamp_position(batch.orig_seq_lens.to(torch.int64))
        if result.mrope_positions is not None:
            # Of a token that is generated all three are its place and an offset of the request's.
            result.mrope_positions = result.mrope_positions + (result.positions - resident)
    elif result.forward_mode.is_extend():
        add_evicted_tokens(result, batch)


MODEL_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
        kind="AROUND",
        function=leave_room_for_side_buffers,
        signature="(self, pre_model_load_memory)",
        capability="memory",
        why="The query window lives beside the KV pool; unless its share is left over, a full pool runs out of memory.",
        upstream="A registry of side buffers that KV pool sizing subtracts.",
        uses=(
            *names("sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator", "model_config kv_cache_dtype"),
            *names(MODEL_CONFIG, "num_hidden_layers num_attention_heads get_num_kv_heads head_dim v_head_dim dtype"),
            f"{RUNTIME_CONTEXT}.get_parallel",
            f"{PARALLEL}.attn_tp_size",
        ),
        surroundings=("sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.configure",),
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool",
        kind="AFTER",
        function=bind_model_runner,
        signature="(self, memory_pool_config=None, *, draft_parallel_layout=None)",
        capability="memory",
        why="The query window must exist, at a fixed address, before decode CUDA graphs are captured.",
        upstream="A `kv_policy` object that ModelRunner builds together with its memory pools.",
        uses=(
            *names(MODEL_RUNNER, "model model_config token_to_kv_pool req_to_token_pool dtype device"),
            f"{MODEL_CONFIG}.get_total_num_kv_heads",
            *names(ATTENTION, "layer_id k_scale_float v_scale_float tp_k_head_num tp_q_head_num qk_head_dim"),
            *names(ATTENTION, "scaling logit_cap sliding_window_size"),
            f"{RUNTIME_CONTEXT}.get_parallel",
            *names(PARALLEL, "attn_tp_rank attn_tp_size"),
            *names(KV_POOL, "k_buffer v_buffer dtype size start_layer"),
            f"{ROWS}.req_to_token",
        ),
        surroundings=(f"{MODEL_RUNNER}.initialize",),
    ),
    Hook(
        target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        kind="AFTER",
        function=use_logical_positions,
        signature=(
            "(batch, model_runner, *, capture_hidden_mode=None, return_hidden_states_before_norm, "
            "extend_position_info=None, spec_mrope_positions=None, kv_loc_plan=None, write_cols=None)"
        ),
        capability="positions",
        why="Positions are taken from seq_lens, which counts resident tokens once a request was compacted.",
        upstream="ForwardBatch.init_new takes positions from `orig_seq_lens`.",
        uses=(
            *names(FORWARD_BATCH, "forward_mode mrope_positions positions"),
            *names(FORWARD_MODE, "is_decode is_extend"),
            *names(BATCH, "reqs orig_seq_lens seq_lens extend_lens"),
            "sglang.srt.model_executor.forward_batch_info.clamp_position",
        ),
    ),
)

# Only where the policy looks at queries.
CAPTURE_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.layers.radix_attention.RadixAttention.forward",
        kind="BEFORE",
        function=record_queries,
        signature="(self, q, k, v, forward_batch, save_kv_cache=True, key_value_num_tokens=None, **kwargs)",
        capability="observe",
        why="The score needs the queries of the last tokens, and no later place sees them for every attention backend.",
        upstream="A call `forward_batch.kv_policy.observe(layer, q)` in RadixAttention.forward.",
        uses=(
            f"{ATTENTION}.layer_id",
            *names(FORWARD_BATCH, "forward_mode req_pool_indices positions"),
            *names(FORWARD_BATCH, "extend_prefix_lens_cpu extend_seq_lens_cpu rids"),
            *names(FORWARD_MODE, "is_decode is_extend"),
            f"{ATTENTION}.qk_head_dim",
        ),
    ),
)
