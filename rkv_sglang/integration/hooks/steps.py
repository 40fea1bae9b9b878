"""Hooks on SGLang's resolution of its arguments: a server that cannot be is refused before anything is started.

Every process loads this module, so what only a policy needs is imported where it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from rkv_sglang.config import NO_POLICY, PARAMETERS_FIELD
from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import ENVS, MODEL_CONFIG, OVERRIDES, SERVER_ARGS
from rkv_sglang.integration.startup.server_args import (
    config_from_args,
    has_settings,
    policy_name,
    resolved_fields,
)

logger = logging.getLogger(__name__)


def refuse_early(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse another SGLang, and flags, before SGLang looks at the model: so it costs no download and no loading.

    It is also the last step that SGLang takes for ``--model-path dummy``.
    """
    previous(server_args)
    if policy_name(server_args) != NO_POLICY:
        # First of all: with another SGLang, even a look at its flags may fail.
        _stop_if(_check_contract)
        if has_settings(server_args):
            _read_parameters(server_args)
        _refuse_flags(server_args)


def refuse_resolved(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse flags and the model at the last step, where every default has been decided; then decide the policy's."""
    previous(server_args)
    if policy_name(server_args) == NO_POLICY:
        return
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    from rkv_sglang.integration.startup.refusals import refuse_model
    from rkv_sglang.integration.startup.sliding import keep_in_one_pool

    _refuse_flags(server_args)
    keep_in_one_pool(server_args)
    _stop_if(lambda: refuse_model(model_config_of(server_args), resolving_view(server_args)))
    if has_settings(server_args):
        # What /server_info shows: with the policy's own defaults, whatever spelling was used.
        declare_resolution(server_args, "rkv_sglang", **resolved_fields(config_from_args(resolving_view(server_args))))


def refuse_late(server_args: Any) -> None:
    """Do what these steps do with a record that was resolved without them."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

    from rkv_sglang.integration.startup.refusals import refuse_model
    from rkv_sglang.integration.startup.sliding import keep_in_one_pool

    _stop_if(_check_contract)
    _refuse_flags(server_args)
    keep_in_one_pool(server_args)
    _stop_if(lambda: refuse_model(model_config_of(server_args), resolving_view(server_args)))


def _check_contract() -> None:
    from rkv_sglang.integration.hooking.releases import require_contract
    from rkv_sglang.integration.startup.errors import RefusedError

    try:
        warning = require_contract()
    except RuntimeError as error:
        raise RefusedError(str(error)) from None
    if warning is not None:
        logger.warning(warning)


def _read_parameters(server_args: Any) -> None:
    """Have all processes go by what is in a file of parameters now: read again, it may be another, gone or empty."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    from rkv_sglang.integration.startup.errors import stop
    from rkv_sglang.integration.startup.policy_parameters import read_parameters

    try:
        parameters = read_parameters(getattr(resolving_view(server_args), PARAMETERS_FIELD))
    except ValueError as error:
        problem = str(error)
    else:
        declare_resolution(server_args, "rkv_sglang", **{PARAMETERS_FIELD: parameters})
        return
    # Outside the handler, so that a caller sees one error and not a chain.
    stop(problem)


def _refuse_flags(server_args: Any) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    from rkv_sglang.integration.startup.refusals import refuse

    _stop_if(lambda: refuse(resolving_view(server_args)))


def _stop_if(check: Callable[[], None]) -> None:
    from rkv_sglang.integration.startup.errors import RefusedError, stop

    try:
        check()
    except RefusedError as error:
        problem = str(error)
    else:
        return
    # Outside the handler, so that a caller sees one error and not a chain.
    stop(problem)


LAST_STEP = "validate_deepep_v2_dispatch_token_budget"

STEP_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.arg_groups.platform_hook.handle_hardware_runtime_validation",
        kind="STEP",
        function=refuse_early,
        signature="(server_args)",
        why="A flag that a policy cannot be combined with would be found only after the model is downloaded.",
        upstream="A place for plugins to check the arguments as they came.",
        uses=(
            "sglang.srt.arg_groups.resolution_hooks.register_resolution_hook",
            *names(OVERRIDES, "declare_resolution resolving_view"),
            # What is refused.
            *names(
                SERVER_ARGS,
                "attention_backend attn_cp_size attn_dp_size dcp_size decode_attention_backend decoupled_spec_role",
            ),
            *names(
                SERVER_ARGS,
                "device disaggregation_decode_enable_offload_kvcache disaggregation_decode_retraction_backup",
            ),
            *names(
                SERVER_ARGS, "disaggregation_mode dllm_algorithm elastic_ep_backend enable_amd_monokernel enable_flexkv"
            ),
            *names(
                SERVER_ARGS,
                "enable_hierarchical_cache enable_hisparse enable_kv_cache_sharding enable_lmcache enable_mis",
            ),
            *names(
                SERVER_ARGS,
                "enable_mixed_chunk enable_nvidia_megakernel enable_page_major_kv_layout enable_pd_role_switch",
            ),
            *names(
                SERVER_ARGS, "enable_pdmux enable_prefill_cp enable_return_indexer_topk enable_return_routed_experts"
            ),
            *names(
                SERVER_ARGS,
                "enable_session_radix_cache enable_streaming_session enable_torch_compile enable_two_batch_overlap",
            ),
            *names(SERVER_ARGS, "enable_unified_cache_external_linker enable_unified_memory encoder_only ep_join_mode"),
            *names(SERVER_ARGS, "hicache_storage_backend is_embedding kv_cache_dtype kv_canary language_only pp_size"),
            *names(
                SERVER_ARGS,
                "prefill_attention_backend prefill_only_disable_kv_cache radix_cache_backend speculative_algorithm",
            ),
            *names(SERVER_ARGS, "grpc_mode moe_a2a_backend smg_grpc_mode use_ray"),
            *names(ENVS, "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING SGLANG_RUST_SERVER SGLANG_USE_HND_KVCACHE"),
            *names(ENVS, "SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE SGLANG_KV_CANARY_ENABLE_VERIFY_TOKEN_ASSERT"),
        ),
    ),
    Hook(
        target=f"sglang.srt.arg_groups.moe_hook.{LAST_STEP}",
        kind="STEP",
        function=refuse_resolved,
        signature="(server_args)",
        why=(
            "What SGLang decides by itself may not go with a policy either, nor may the model; the launcher's hooks "
            "are checked and applied here too."
        ),
        upstream="A place for plugins to check the resolved arguments.",
        uses=(
            *names(OVERRIDES, "declare_resolution model_config_of resolving_view"),
            *names(
                MODEL_CONFIG,
                "attention_arch attention_chunk_size hf_config hf_text_config is_encoder_decoder is_generation",
            ),
            *names(MODEL_CONFIG, "is_hybrid_swa model_path use_engram use_ngram_embedding"),
            *names(MODEL_CONFIG, "_derive_hybrid_model disable_hybrid_swa_memory get_swa_num_kv_heads swa_head_dim"),
            *names(MODEL_CONFIG, "get_total_num_kv_heads head_dim num_attention_heads swa_v_head_dim v_head_dim"),
            "sglang.srt.configs.model_config.is_hybrid_swa_model",
            f"{SERVER_ARGS}.disable_hybrid_swa_memory",
            *names("sglang.srt.configs.model_config.AttentionArch", "MHA MLA SSM"),
            "sglang.srt.configs.hybrid_arch.mambaish_config",
            # Of rkv-sglang doctor --command, which takes the steps of a start.
            *names(SERVER_ARGS, "check_server_args device from_cli_args page_size resolve_once"),
            *names("sglang.cli.serve", "_extract_model_type_override _normalize_positional_model_path"),
            "sglang.srt.utils.server_args_config_parser.ConfigArgumentMerger.merge_config_with_args",
            "sglang.srt.runtime_context.override_platform",
            "sglang.srt.utils.get_device",
        ),
    ),
)
