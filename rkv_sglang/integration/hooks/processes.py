"""Hooks at the doors of SGLang's processes: they apply the others where a policy is set, and see that it happened.

Every process loads this module, so what only a policy needs is imported where it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rkv_sglang.config import ARGS_VARIABLE, NO_POLICY, POLICY_FIELD
from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooking.install import install
from rkv_sglang.integration.hooks.owners import (
    ALLOCATOR,
    ATTENTION,
    BATCH,
    FORWARD_BATCH,
    KV_POOL,
    MANAGERS,
    MEM_CACHE,
    MODEL_RUNNER,
    PARALLEL,
    REQ,
    ROPE,
    ROWS,
    RUNTIME_CONTEXT,
    SAMPLING_PARAMS,
    SCHEDULER,
    SERVER_ARGS,
    TREE,
)
from rkv_sglang.integration.startup.server_args import config_from_args, has_settings, policy_name


def start_scheduler(init: Callable[..., None], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Build a scheduler; with a policy, hook it first and check afterwards that what was built can be compacted.

    Raises:
        RuntimeError: SGLang is not as the hooks expect, or one could not be applied.
        ValueError: The scheduler's pools or tree are of a kind that the policy does not know.
    """
    if policy_name(server_args) == NO_POLICY:
        return init(scheduler, server_args, *args, **kwargs)
    # Here, so that a scheduler without a policy loads none of it.
    from rkv_sglang.integration.startup.environment import CARRIED_ATTRIBUTE

    if not (has_settings(server_args) or getattr(server_args, CARRIED_ATTRIBUTE, False)):
        # The plugin in a launcher marks every record that leaves it, and gives all but a program's own the settings.
        raise RuntimeError(
            f"{ARGS_VARIABLE} is set, but the process that started this scheduler runs without the plugin: load "
            "SGLang's plugins there, and check that SGLANG_PLUGINS, if set, names rkv_sglang"
        )
    from sglang.srt.arg_groups.overrides import resolving_view

    from rkv_sglang.integration.hooking.releases import require_contract
    from rkv_sglang.integration.hooks.admission import ADMISSION_HOOKS
    from rkv_sglang.integration.hooks.answers import STREAMER_HOOKS
    from rkv_sglang.integration.hooks.metrics import METRICS_HOOKS
    from rkv_sglang.integration.hooks.model import CAPTURE_HOOKS, MODEL_HOOKS
    from rkv_sglang.integration.hooks.native import host_capabilities, set_native_policy, without_native
    from rkv_sglang.integration.hooks.restore import RESTORE_HOOKS
    from rkv_sglang.integration.hooks.scheduler import SCHEDULER_HOOKS
    from rkv_sglang.integration.runtime.current import set_runtime
    from rkv_sglang.integration.runtime.runtime import Runtime
    from rkv_sglang.integration.startup.refusals import refuse_runtime

    # This process may have been started with another SGLang than the launcher's; that one warned of what differs.
    require_contract()
    runtime = Runtime(config_from_args(resolving_view(server_args)))
    set_runtime(runtime)
    capture_hooks = () if runtime.looks_at_nothing else CAPTURE_HOOKS
    hooks = MODEL_HOOKS + capture_hooks + ADMISSION_HOOKS + RESTORE_HOOKS
    hooks += SCHEDULER_HOOKS + STREAMER_HOOKS + METRICS_HOOKS
    capabilities = host_capabilities()
    install(without_native(hooks, capabilities))
    if capabilities:
        set_native_policy()
    init(scheduler, server_args, *args, **kwargs)
    refuse_runtime(scheduler)
    runtime.bind_scheduler(scheduler)


def is_loaded(hook: Hook) -> bool:
    """Return whether the module of a hook's target has been imported in this process."""
    parent = str(hook.target).rpartition(".")[0]
    return parent in sys.modules or parent.rpartition(".")[0] in sys.modules


def install_answer_hooks() -> None:
    """Install the hooks of a process that answers requests, if it is one.

    Raises:
        RuntimeError: SGLang is not as they expect, or one could not be applied.
    """
    from rkv_sglang.integration.hooking.releases import require_contract
    from rkv_sglang.integration.hooks.answers import META_INFO_HOOKS

    require_contract()
    install(tuple(hook for hook in META_INFO_HOOKS if is_loaded(hook)))


def check_before_launch() -> None:
    """Install what a launcher with a policy needs, or end the start in one line."""
    from rkv_sglang.integration.hooking.releases import require_contract
    from rkv_sglang.integration.hooks.answers import META_INFO_HOOKS
    from rkv_sglang.integration.startup.errors import stop

    try:
        # Seen at the first step already, unless another plugin took the place of that one.
        require_contract()
        install(LAUNCHER_HOOKS + META_INFO_HOOKS)
        return
    except RuntimeError as error:
        problem = str(error)
    stop(problem)


def check_resolved(_: None, server_args: Any) -> None:
    """Check, before a launcher starts anything, a record that was resolved before the plugin was there."""
    if policy_name(server_args) == NO_POLICY:
        return
    from rkv_sglang.integration.hooks.steps import refuse_late

    refuse_late(server_args)
    check_before_launch()


def start_controller(init: Callable[..., None], controller: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Build a data-parallel controller; with a policy, make it pass on what its schedulers report."""
    if policy_name(server_args) != NO_POLICY:
        install(CONTROLLER_HOOKS)
    init(controller, server_args, *args, **kwargs)


def pass_on_policy(result: dict[str, Any], controller: Any) -> None:
    """Report a policy only if every replica reports it."""
    policies = {info.get(POLICY_FIELD) for info in controller._scheduler_init_infos}
    if len(policies) == 1:
        result[POLICY_FIELD] = policies.pop()


def require_policy_everywhere(tokenizer_manager: Any, scheduler_init_result: Any, startup_tic: float) -> None:
    """Refuse to serve as ``require_policy`` does, however an engine of another kind starts its schedulers."""
    require_policy(scheduler_init_result.scheduler_infos)


def require_policy(result: list[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
    """Refuse to serve unless every scheduler says that its policy is on.

    Raises:
        RuntimeError: One does not, so its process runs without the plugin.
    """
    if not all(info.get(POLICY_FIELD) not in (None, NO_POLICY) for info in result):
        raise RuntimeError(
            "--kv-policy is set but a scheduler process runs without it: see 'Failed to load plugin' or 'Failed to "
            "execute general plugin' above, and check that SGLANG_PLUGINS, if set, names rkv_sglang"
        )


PROCESS_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.__init__",
        kind="AROUND",
        function=start_scheduler,
        signature="(self, server_args, port_args)",
        why="The first place in a scheduler process that knows the flags; without a policy it applies nothing.",
        upstream="Plugins get the resolved server arguments before a scheduler is built.",
        uses=(
            *names(
                SCHEDULER,
                "max_running_requests max_total_num_tokens metrics_reporter model_config page_size tree_cache",
            ),
            *names(SCHEDULER, "is_hybrid_ssm is_hybrid_swa server_args token_to_kv_pool_allocator tp_worker"),
            *names(SCHEDULER, "device req_to_token_pool"),
            "sglang.srt.arg_groups.overrides.resolving_view",
            *names(RUNTIME_CONTEXT, "get_exec get_model get_parallel get_serving"),
            "sglang.srt.utils.hf_transformers_utils.get_tokenizer",
            # What measures the model's queries, for policies that need them.
            *names(BATCH, "init_new input_ids prefill_input_ids_cpu prepare_for_decode prepare_for_extend"),
            *names(REQ, "extend_end full_untruncated_fill_ids logprob_start_len"),
            f"{FORWARD_BATCH}.init_new",
            *names(MODEL_RUNNER, "forward model"),
            *(f"{part}.clear" for part in (ROWS, ALLOCATOR)),
            f"{TREE}.reset",
            f"{SAMPLING_PARAMS}.temperature",
            "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.NONE",
            *names(f"{ROPE}.base.RotaryEmbedding", "_compute_inv_freq base is_neox_style"),
            f"{ROPE}.rope_variant.Llama3RotaryEmbedding._compute_inv_freq",
            *names(f"{ROPE}.yarn.YaRNScalingRotaryEmbedding", "_compute_inv_freq mscale scaling_factor"),
            f"{MODEL_RUNNER}Output.logits_output",
            "sglang.srt.layers.logits_processor.LogitsProcessorOutput.next_token_logits",
            *names(SERVER_ARGS, "revision tokenizer_backend tokenizer_mode tokenizer_path trust_remote_code"),
            f"{SERVER_ARGS}.cuda_graph_config",
            "sglang.srt.model_executor.cuda_graph_config.CudaGraphConfig.decode",
            *names("sglang.srt.model_executor.cuda_graph_config.PhaseConfig", "backend max_bs"),
            f"{MANAGERS}.tp_worker.TpModelWorker.model_runner",
            *names(
                MEM_CACHE,
                "allocator.TokenToKVPoolAllocator memory_pool.MHATokenToKVPool unified_radix_cache.UnifiedRadixCache",
            ),
            f"{MEM_CACHE}.memory_pool.MLATokenToKVPool.kv_buffer",
            *names(KV_POOL, "dtype is_quantized_kv_cache kv_cache_layout layer_num start_layer"),
            *names(ATTENTION, "attn_type is_cross_attention layer_id logit_cap logit_capping_method scaling"),
            *names(ATTENTION, "sliding_window_size use_irope xai_temperature_len"),
            *names(ATTENTION, "qk_head_dim tp_k_head_num tp_q_head_num v_head_dim"),
            f"{PARALLEL}.attn_dp_size",
            "sglang.srt.layers.radix_attention.AttentionType.DECODER",
        ),
        surroundings=(f"{MANAGERS}.scheduler.run_scheduler_process",),
    ),
    Hook(
        target="sglang.srt.managers.data_parallel_controller.DataParallelController.__init__",
        kind="AROUND",
        function=start_controller,
        signature="(self, server_args, port_args, run_scheduler_process_func, prelaunched_schedulers=None)",
        why="The first place in a controller process that knows the flags; without a policy it applies nothing.",
        upstream="As for the scheduler.",
    ),
    Hook(
        target="sglang.srt.arg_groups.validation_hook.check_server_args",
        kind="AFTER",
        function=check_resolved,
        signature="(server_args)",
        why=(
            "A program that makes the record itself may have it resolved before the plugin is loaded; this is the "
            "first that a launcher does with it afterwards."
        ),
        upstream="Plugins are loaded before a record is resolved.",
    ),
)

CONTROLLER_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info",
        kind="AFTER",
        function=pass_on_policy,
        signature="(self)",
        why="The controller drops what it does not know from its schedulers' ready messages.",
        upstream="The controller's ready message carries its schedulers' policy.",
        uses=("sglang.srt.managers.data_parallel_controller.DataParallelController._scheduler_init_infos",),
    ),
)

LAUNCHER_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
        kind="AFTER",
        function=require_policy,
        signature="(scheduler_pipe_readers, scheduler_procs)",
        why="SGLang logs a plugin's failure in a child process and serves on, silently without the policy.",
        upstream="A strict mode in which a plugin that fails to load stops the server.",
        surroundings=("sglang.srt.entrypoints.engine.Engine._launch_subprocesses",),
    ),
    Hook(
        target="sglang.srt.entrypoints.engine.Engine._set_startup_time",
        kind="BEFORE",
        function=require_policy_everywhere,
        signature="(tokenizer_manager, scheduler_init_result, startup_tic)",
        why="An engine that starts its schedulers in its own way, as Ray's does, waits for them in its own way, too.",
        upstream="As for the other.",
        uses=("sglang.srt.entrypoints.engine.SchedulerInitResult.scheduler_infos",),
    ),
)
