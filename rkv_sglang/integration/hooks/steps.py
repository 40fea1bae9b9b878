"""Hooks on SGLang's resolution of its arguments: a server that cannot be is refused before anything is started.

Every process loads this module, so what only a policy needs is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkv_sglang.config import NO_POLICY
from rkv_sglang.integration.hooking.hook import Hook, names
from rkv_sglang.integration.hooks.owners import MODEL_CONFIG, OVERRIDES
from rkv_sglang.integration.startup.server_args import (
    PARAMETERS_FIELD,
    config_from_args,
    policy_name,
    resolved_fields,
)


def refuse_early(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse flags before SGLang looks at the model: a wrong one costs neither a download nor the loading of a config.

    It is also the last step that SGLang takes for ``--model-path dummy``.
    """
    previous(server_args)
    if policy_name(server_args) != NO_POLICY:
        _read_parameters(server_args)
        _refuse_flags(server_args)


def refuse_resolved(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse flags and the model at the last step, where every default has been decided; then decide the policy's."""
    previous(server_args)
    if policy_name(server_args) == NO_POLICY:
        return
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    from rkv_sglang.integration.startup.refusals import refuse_model

    _refuse_flags(server_args)
    _stop_if(lambda: refuse_model(model_config_of(server_args), resolving_view(server_args)))
    # What /server_info shows: with the policy's own defaults, whatever spelling was used.
    declare_resolution(server_args, "rkv_sglang", **resolved_fields(config_from_args(resolving_view(server_args))))


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
            "sglang.srt.environ.envs",
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
            *names(MODEL_CONFIG, "is_hybrid_swa model_is_mrope model_path use_engram use_ngram_embedding"),
            *names("sglang.srt.configs.model_config.AttentionArch", "MHA SSM"),
            "sglang.srt.configs.hybrid_arch.mambaish_config",
        ),
    ),
)
