"""Refuse, before and while a scheduler starts, what a KV policy cannot serve rightly."""

from collections.abc import Iterator
from typing import Any

from rkv_sglang.config import HEAD, NO_POLICY, PolicyConfig
from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.refused_settings import REFUSED_SETTINGS, RefusedSetting
from rkv_sglang.integration.startup.server_args import config_from_args, policy_name, read_config
from rkv_sglang.integration.startup.sliding import (
    attention_window,
    latest_kept,
    needs_second_pool,
    uneven_heads,
)
from rkv_sglang.integration.startup.verify_switch import verify_problem

_KNOWN_LAYERS = ("full_attention", "attention", "sliding_attention")
# Models that write by diffusion, and others in which a token attends to what comes behind it.
LOOK_AHEAD = (
    "DiffusionGemmaForBlockDiffusion",
    "HrmTextForCausalLM",
    "LLaDA2MoeModelLM",
    "SDARForCausalLM",
    "SDARMoeForCausalLM",
)


def refuse(server_args: Any) -> None:
    """Refuse values out of range and settings that do not go with a policy. Does nothing without a policy.

    Args:
        server_args: SGLang's resolved view of an ``RKVServerArgs``, or a raw one, whose unset fields are let pass.

    Raises:
        RefusedError: The first problem, in one line.
    """
    for problem in flag_problems(server_args):
        raise RefusedError(problem)


def flag_problems(server_args: Any) -> Iterator[str]:
    """Yield every reason for which ``refuse`` would refuse these arguments, one line each."""
    policy = policy_name(server_args)
    if policy == NO_POLICY:
        return
    config, problems = read_config(server_args)
    yield from problems
    yield from filter(None, [verify_problem()])
    for refused, value in _refused_values(server_args, config):
        is_variable = not refused.setting.startswith("--")
        shown = refused.setting if value is True else f"{refused.setting} {value}"
        mend = refused.mend or (f"unset {refused.setting}" if is_variable else f"leave {refused.setting} out")
        yield f"{shown} cannot be combined with --kv-policy {policy}: {refused.why}; {mend}"


def refused_values(server_args: Any) -> Iterator[tuple[RefusedSetting, Any]]:
    """Yield every setting that this policy, as it is set here, cannot be combined with, and its value."""
    yield from _refused_values(server_args, read_config(server_args)[0])


def _refused_values(server_args: Any, config: PolicyConfig | None) -> Iterator[tuple[RefusedSetting, Any]]:
    records_nothing = _records_nothing(config)
    for refused in REFUSED_SETTINGS:
        value = None if refused.records_only and records_nothing else refused.found(server_args)
        if value is not None and value is not False:
            yield refused, value


def _records_nothing(config: PolicyConfig | None) -> bool:
    """Return whether the policy looks at places alone, so that no query is recorded; False without good settings."""
    from rkv_sglang.policies import looks_at_nothing

    return config is not None and looks_at_nothing(config)


def refuse_model(model_config: Any, server_args: Any) -> None:
    """Refuse a model whose cache is not one plain sequence of tokens in every layer.

    Args:
        model_config: SGLang's ``ModelConfig``.
        server_args: As in ``refuse``; a policy that looks at places alone does not mind what a token's entry is.

    Raises:
        RefusedError: The first problem, in one line.
    """
    for problem in model_problems(model_config, server_args):
        raise RefusedError(problem)


def model_problems(model_config: Any, server_args: Any) -> Iterator[str]:
    """Yield every reason for which ``refuse_model`` would refuse this model, one line each."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    text_config = model_config.hf_text_config
    config = read_config(server_args)[0]
    records_nothing = _records_nothing(config)
    served = (AttentionArch.MHA, AttentionArch.MLA) if records_nothing else (AttentionArch.MHA,)
    layer_types = set(getattr(text_config, "layer_types", None) or ())
    other_layers = sorted(layer_types - set(_KNOWN_LAYERS))
    sliding = (getattr(text_config, "sliding_window", None) or 0) if "sliding_attention" in layer_types else 0
    # Latent attention has one entry a token in every layer.
    uneven = uneven_heads(model_config) if model_config.attention_arch == AttentionArch.MHA else None
    # Settings that are no good are refused before.
    flag, kept = latest_kept(config or PolicyConfig())
    problems = (
        (not model_config.is_generation, "it does not generate"),
        (model_config.is_encoder_decoder, "its decoder also attends to an encoder's cache"),
        (
            any(name in LOOK_AHEAD for name in model_config.hf_config.architectures or ()),
            "its tokens attend to later ones, too, and compaction expects that none is seen before it is written",
        ),
        (
            mambaish_config(model_config) is not None or model_config.attention_arch == AttentionArch.SSM,
            "some of its layers keep a recurrent state instead of keys and values",
        ),
        (
            model_config.attention_arch not in served,
            f"its attention is {model_config.attention_arch.name}, and keys are scored per KV head",
        ),
        (
            bool(model_config.is_hybrid_swa) or needs_second_pool(model_config),
            "its sliding windows are kept in a second pool, and have not been shown right in one with all layers",
        ),
        (
            uneven == "KV",
            "its layers differ in the number or size of their KV heads, which takes a pool for each kind",
        ),
        (
            uneven == "query" and not records_nothing,
            "its layers differ in the number of their query heads, and queries are recorded for all layers alike",
        ),
        (
            bool(model_config.attention_chunk_size),
            "some of its layers attend to chunks, which are counted in tokens still cached",
        ),
        (kept < sliding, f"some of its layers attend to the latest {sliding} tokens: set {flag} to at least that"),
        (
            sliding > 0 and config is not None and config.prompt_budget > 0 and config.granularity == HEAD,
            "of a sliding window the latest tokens must stay, and of a prompt every head chooses others: leave "
            "--kv-prompt-budget out or set --kv-granularity request",
        ),
        (bool(other_layers), f"some of its layers are of type {', '.join(other_layers)}"),
        (
            getattr(model_config.hf_config, "dual_chunk_attention_config", None) is not None,
            "its dual chunk attention counts chunks in tokens still cached",
        ),
        (
            any("GlmImage" in name for name in model_config.hf_config.architectures or ()),
            "the positions of what it generates are those of an image's places",
        ),
        (
            bool(model_config.use_ngram_embedding or model_config.use_engram),
            "its n-gram embedding looks tokens up by their place in the cache",
        ),
    )
    for is_refused, why in problems:
        if is_refused:
            architecture = (model_config.hf_config.architectures or ["this model"])[0]
            yield (
                f"--model-path {model_config.model_path} ({architecture}) cannot be served with a --kv-policy: {why}; "
                "serve it with --kv-policy none"
            )


def refuse_runtime(scheduler: Any) -> None:
    """Check, once a scheduler is built, that it holds its cache as the policy expects. Does nothing without a policy.

    Raises:
        RefusedError: The first problem, in one line.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    if policy_name(scheduler.server_args) == NO_POLICY:
        return
    # Seen by the launcher already, unless another plugin took the place of a step there.
    refuse(resolving_view(scheduler.server_args))
    refuse_model(scheduler.model_config, resolving_view(scheduler.server_args))
    problem = _pool_problem(scheduler) or _layer_problem(
        scheduler, config_from_args(resolving_view(scheduler.server_args))
    )
    if problem is not None:
        raise RefusedError(
            f"--kv-policy cannot be used with this model and these flags: {problem}; serve them with --kv-policy none"
        )


def _pool_problem(scheduler: Any) -> str | None:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from rkv_sglang.kernels.paged_batch import KEY_DTYPES

    allocator = scheduler.token_to_kv_pool_allocator
    pool = allocator.get_kvcache()
    # Exact types: a subclass may lay out, share or copy entries in its own way.
    records_nothing = _records_nothing(read_config(resolving_view(scheduler.server_args))[0])
    for part, expected in (
        (pool, (MHATokenToKVPool, MLATokenToKVPool) if records_nothing else (MHATokenToKVPool,)),
        (allocator, (TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator)),
        (scheduler.tree_cache, (UnifiedRadixCache,)),
    ):
        if type(part) not in expected:
            names = " or ".join(kind.__name__ for kind in expected)
            return f"SGLang built {type(part).__name__}, and the policy knows {names}"
    if scheduler.is_hybrid_swa or scheduler.is_hybrid_ssm:
        return "the scheduler keeps a second cache, of sliding windows or of recurrent states"
    # One of MLA has one entry a token, and no other layout.
    if isinstance(pool, MHATokenToKVPool) and pool.kv_cache_layout != "nhd":
        return f"the KV pool has the layout {pool.kv_cache_layout}, and the policy knows nhd"
    if pool.dtype not in KEY_DTYPES or (isinstance(pool, MHATokenToKVPool) and pool.is_quantized_kv_cache):
        return f"the KV pool stores {pool.dtype}, whose numbers the policy cannot read (see --kv-cache-dtype)"
    return None


def _heads(layer: Any, *, of_queries: bool) -> tuple[int, ...]:
    of_entries = layer.tp_k_head_num, layer.qk_head_dim, layer.v_head_dim
    return (layer.tp_q_head_num, *of_entries) if of_queries else of_entries


def _layer_problem(scheduler: Any, config: PolicyConfig) -> str | None:
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    model_runner = scheduler.tp_worker.model_runner
    layers = [module for module in model_runner.model.modules() if isinstance(module, RadixAttention)]
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    # How a layer makes its logits is asked by scores alone.
    is_scored = not _records_nothing(config)
    for layer in layers:
        if layer.use_irope:
            return f"attention layer {layer.layer_id} attends to chunks, counted in tokens still cached"
        if layer.xai_temperature_len > 0:
            return f"attention layer {layer.layer_id} scales by length, counted in tokens still cached"
        if is_scored and (layer.scaling, layer.logit_cap) != (layers[0].scaling, layers[0].logit_cap):
            return f"attention layers 0 and {layer.layer_id} scale or cap their logits in different ways"
        if is_scored and layer.logit_cap and layer.logit_capping_method != "tanh":
            return f"attention layer {layer.layer_id} caps its logits by {layer.logit_capping_method}, not by tanh"
        same = _heads(layer, of_queries=is_scored) == _heads(layers[0], of_queries=is_scored)
        if not isinstance(pool, MLATokenToKVPool) and not same:
            return f"attention layers 0 and {layer.layer_id} differ in the number or size of their heads"
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            return f"attention layer {layer.layer_id} is not causal self-attention"
    ids = [layer.layer_id for layer in layers]
    # With MLA, a layer has one for prefill and one for decode.
    if sorted({*ids} if isinstance(pool, MLATokenToKVPool) else ids) != list(
        range(pool.start_layer, pool.start_layer + pool.layer_num)
    ):
        return f"{len(layers)} attention layers share {pool.layer_num} layers of KV cache"
    flag, kept = latest_kept(config)
    attended = attention_window(layers)
    if kept < attended:
        return f"some attention layers see the latest {attended} tokens: set {flag} to at least that"
    if attended > 0 and config.prompt_budget > 0 and config.granularity == HEAD:
        return (
            f"some attention layers see the latest {attended} tokens, which must stay: leave --kv-prompt-budget out or "
            "set --kv-granularity request"
        )
    return None
