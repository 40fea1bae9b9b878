"""What the names of this package stand for, where they stand for something of SGLang's."""

from rkv_sglang.integration.hooks.owners import (
    ADDER,
    ALLOCATOR,
    ATTENTION,
    BATCH,
    FORWARD_BATCH,
    FORWARD_MODE,
    KV_POOL,
    MANAGERS,
    MEM_CACHE,
    MODEL_CONFIG,
    MODEL_RUNNER,
    PARALLEL,
    PENALTIES,
    REPORTER,
    REQ,
    REQ_KV,
    ROWS,
    SAMPLING_PARAMS,
    SCHEDULER,
    TREE,
)

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"

GRAPH_CONFIG = "sglang.srt.model_executor.cuda_graph_config"
COLLECTOR = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector"
# None of SGLang's: a number, a tensor, something of this package, of Python or of transformers.
OTHER = "other"
# What is of SGLang's: variables and attributes by their names, of lists what is in them, of methods what they return;
# FUNCTION.VARIABLE where a name means something else elsewhere.
OWNERS = {
    "_args()": SERVER_ARGS,
    "_look_at_resolved.args": SERVER_ARGS,
    "_shared_attention_backend.args": SERVER_ARGS,
    "_timer": "sglang.srt.utils.device_timer.DeviceTimer",
    "add_policy_stats.result": f"{MANAGERS}.io_struct.GetInternalStateReqOutput",
    "abort_req": f"{MANAGERS}.io_struct.AbortReq",
    "adder": ADDER,
    "inquirer": f"{MANAGERS}.scheduler_components.load_inquirer.SchedulerLoadInquirer",
    "loads": f"{MANAGERS}.load_snapshot.LoadSnapshot",
    "orchestrator": f"{PENALTIES}.BatchedPenalizerOrchestrator",
    "output_streamer": f"{MANAGERS}.scheduler_components.output_streamer.SchedulerOutputStreamer",
    "penalizer": f"{PENALTIES}.BatchedMinNewTokensPenalizer",
    "penalizer_orchestrator": f"{PENALTIES}.BatchedPenalizerOrchestrator",
    "sampling_info": "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo",
    "allocator": ALLOCATOR,
    "batch": BATCH,
    "collector": COLLECTOR,
    "configurator": "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator",
    "controller": f"{MANAGERS}.data_parallel_controller.DataParallelController",
    "cuda_graph_config": f"{GRAPH_CONFIG}.CudaGraphConfig",
    "decode": f"{GRAPH_CONFIG}.PhaseConfig",
    "embedding": "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding",
    "forward_batch": FORWARD_BATCH,
    "attn_tp_group": "sglang.srt.distributed.parallel_state.GroupCoordinator",
    "forward_mode": FORWARD_MODE,
    "get_kvcache": KV_POOL,
    # The part of the arguments that SGLang publishes under this name.
    "graph": SERVER_ARGS,
    "kv": REQ_KV,
    "lambda.args": SERVER_ARGS,
    "_padded_to_prefills.args": SERVER_ARGS,
    "local_batch": BATCH,
    "stock_class": SERVER_ARGS,
    "layer": ATTENTION,
    "leave_room_for_side_buffers.model": MODEL_CONFIG,
    "layers": ATTENTION,
    "memory_budget": f"{MEM_CACHE}.prefill_budget.PrefillBudget",
    "metrics_collector": COLLECTOR,
    "metrics_reporter": REPORTER,
    "model_config": MODEL_CONFIG,
    "mm_items": f"{MANAGERS}.schedule_batch.MultimodalDataItem",
    "model_runner": MODEL_RUNNER,
    "multimodal_inputs": f"{MANAGERS}.schedule_batch.MultimodalInputs",
    "owner": REQ,
    "pool": KV_POOL,
    "req": REQ,
    "req_to_token_pool": ROWS,
    "reqs": REQ,
    "runner": MODEL_RUNNER,
    "running_batch": BATCH,
    "sampling_params": SAMPLING_PARAMS,
    "scheduler": SCHEDULER,
    "scheduler_init_result": "sglang.srt.entrypoints.engine.SchedulerInitResult",
    "server_args": SERVER_ARGS,
    "to_finish": f"{MANAGERS}.schedule_batch.FINISH_ABORT",
    "token_to_kv_pool": KV_POOL,
    "token_to_kv_pool_allocator": ALLOCATOR,
    "tp_worker": f"{MANAGERS}.tp_worker.TpModelWorker",
    "tree_cache": TREE,
    "unpack_answer_info.state": f"{MANAGERS}.tokenizer_manager.ReqState",
    "use_logical_positions.result": FORWARD_BATCH,
    "view": SERVER_ARGS,
    "waiting_queue": REQ,
}
# What is none of SGLang's, though nothing else in the package says so.
PLAIN = {
    "_compute_inv_freq",
    "_counted_for_preemption",
    "_patched",
    "_scheduler_init_infos",
    "_tokenizer()",
    "next_token_logits",
    "policy",
    "prefill_input_ids_cpu",
    "all_values_flatten",
    "cumulated_frequency_penalties",
    "cumulated_presence_penalties",
    "cumulated_repetition_penalties",
    "frequency_penalties",
    "kept_indices",
    "presence_penalties",
    "repetition_penalties",
    "schedule_stream",
    "attention_arch",
    "custom_params",
    "customized_info_accumulated",
    "customized_info_reported_keys",
    "dtype",
    "forward_stream",
    "given",
    "group",
    "hf_config",
    "histogram",
    "lambda.finding",
    "model",
    "orig_seq_lens",
    "penalizers",
    "positions",
    "req_to_token",
    "seq_lens",
}
# Functions of SGLang and what they return, and attributes whose name says too little.
VALUES = {
    "sglang.cli.serve._extract_model_type_override": OTHER,
    "sglang.srt.arg_groups.overrides.model_config_of": MODEL_CONFIG,
    "sglang.srt.model_executor.model_runner.ModelRunner.forward": (
        "sglang.srt.model_executor.model_runner.ModelRunnerOutput"
    ),
    "sglang.srt.model_executor.model_runner.ModelRunnerOutput.logits_output": (
        "sglang.srt.layers.logits_processor.LogitsProcessorOutput"
    ),
    "sglang.srt.environ.envs.SGLANG_RADIX_FORCE_MISS": OTHER,
    f"{TREE}.insert": f"{MEM_CACHE}.base_prefix_cache.InsertResult",
    # Parts of the arguments, published.
    "sglang.srt.runtime_context.get_model": SERVER_ARGS,
    "sglang.srt.runtime_context.get_serving": SERVER_ARGS,
    "sglang.srt.runtime_context.get_exec": OTHER,
    "sglang.srt.runtime_context.get_parallel": PARALLEL,
}
# Classes of this package that are made of SGLang's.
SUBCLASSES = {
    "PolicyOutputStreamer": f"{MANAGERS}.scheduler_components.output_streamer.SchedulerOutputStreamer",
    "NativePolicy": "sglang.srt.mem_cache.kv_policy.KVPolicy",
    "PolicyPrefillAdder": ADDER,
    "RKVServerArgs": SERVER_ARGS,
}
# Modules that only this package's patches put into SGLang, and the classes made of theirs.
OF_PATCHES = ("sglang.srt.mem_cache.kv_policy",)
# Members that this package gives to SGLang's classes, by how they begin.
OWN_MEMBERS = {
    SERVER_ARGS: (
        "kv_policy",
        "kv_budget",
        "kv_buffer",
        "kv_granularity",
        "kv_window",
        "kv_prompt_budget",
        "kv_stagger",
        "kv_trace",
        "rkv_",
    ),
    ADDER: ("_counted_for_preemption",),
    # Only pools of latents have it, and they are told by it.
    KV_POOL: ("kv_buffer",),
}
# Functions of this package that read the field or variable that is named by their first argument, or by their caller's.
FIELD_READERS = {
    "_is_on": SERVER_ARGS,
    "_is_given": SERVER_ARGS,
    "_is_above_one": SERVER_ARGS,
    "_is_none_of": SERVER_ARGS,
    "_in_environment": "sglang.srt.environ.envs",
    # Fields that are this package's own.
    "_given": SERVER_ARGS,
}
