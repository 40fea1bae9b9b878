"""Layers that attend to the latest tokens alone: how many these are, and which settings keep as many.

A layer's window counts the entries of a request's row. What is kept lies at its end, so as long as all of the latest
tokens that the window takes in are kept, it takes in just these.
"""

import logging
from collections.abc import Iterable
from typing import Any

from rkv_sglang.config import HEAD, PolicyConfig

logger = logging.getLogger(__name__)

# Models for which SGLang makes a second pool, and whose layers say themselves how far they see, so that one pool does.
_ONE_POOL_DOES = (
    "GptOssForCausalLM",
    "GraniteSWAForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "IQuestQ1ForCausalLM",
    "MellumForCausalLM",
    "LagunaForCausalLM",
    "MuseGlimmerForCausalLM",
    "Step3p5ForCausalLM",
    "MiMoV2ForCausalLM",
    "MiMoV2FlashForCausalLM",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
)
ONE_POOL_FLAG = "--disable-hybrid-swa-memory"


def needs_second_pool(model_config: Any) -> bool:
    """Return whether SGLang's ``ModelConfig`` is of a model whose windows are not known to be right in one pool."""
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    architectures = model_config.hf_config.architectures or ()
    has_two = bool(is_hybrid_swa_model(architectures, model_config.hf_text_config))
    return has_two and not any(architecture in _ONE_POOL_DOES for architecture in architectures)


def keep_in_one_pool(server_args: Any) -> bool:
    """Have SGLang keep windows in one pool with all other layers, as ``--disable-hybrid-swa-memory`` does.

    Changes the resolution of the record and the ``ModelConfig`` that it has made already. Call it before the record is
    published.

    Args:
        server_args: SGLang's record, for a server with a policy.

    Returns:
        Whether SGLang would have made a second pool; False as well if it goes on to (see ``needs_second_pool``).
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of

    model_config = model_config_of(server_args)
    if not model_config.is_hybrid_swa or needs_second_pool(model_config):
        return False
    declare_resolution(server_args, "rkv_sglang", disable_hybrid_swa_memory=True)
    model_config.disable_hybrid_swa_memory = True
    model_config._derive_hybrid_model()
    # SGLang sets up its own logging later, which would say less than a warning by itself.
    logger.warning("%s is set, because a KV policy keeps sliding windows in one pool with all layers", ONE_POOL_FLAG)
    return True


def uneven_heads(model_config: Any) -> str | None:
    """Return which heads of layers that slide differ from those of other layers, ``KV`` or ``query``; None if none."""
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    text_config = model_config.hf_text_config
    if not is_hybrid_swa_model(model_config.hf_config.architectures or (), text_config):
        # What other models have of these fields is of something else.
        return None
    full = (model_config.get_total_num_kv_heads(), model_config.head_dim, model_config.v_head_dim)
    sliding = (model_config.get_swa_num_kv_heads(1), model_config.swa_head_dim, model_config.swa_v_head_dim)
    if full != sliding:
        return "KV"
    other = getattr(text_config, "attention_other_setting", None) or {}
    counts = {
        model_config.num_attention_heads,
        getattr(text_config, "swa_num_attention_heads", None) or model_config.num_attention_heads,
        other.get("num_attention_heads", model_config.num_attention_heads),
        *(getattr(text_config, "num_attention_heads_per_layer", None) or ()),
    }
    return "query" if len(counts) > 1 else None


def attention_window(layers: Iterable[Any]) -> int:
    """Return the most tokens, its own included, to which a token attends in such layers; 0 if none of them is one.

    Args:
        layers: SGLang's ``RadixAttention``, whose ``sliding_window_size`` does not count a token's own entry.
    """
    return max((layer.sliding_window_size + 1 for layer in layers if layer.sliding_window_size > 0), default=0)


def latest_kept(config: PolicyConfig) -> tuple[str, int]:
    """Return how many of a request's latest tokens stay in such a layer, and the flag that says so."""
    return ("--kv-budget", config.budget) if config.granularity == HEAD else ("--kv-window", config.window)
