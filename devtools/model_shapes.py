"""Shapes of the models that people serve: what their public ``config.json`` says of attention, and little else.

They stand for the model where a launch is judged without its files (``rkv-sglang doctor --model-config``).
"""

from typing import Any

Shape = dict[str, Any]


def _decoder(
    architecture: str, model_type: str, layers: int, hidden: int, heads: int, kv_heads: int, **more: Any
) -> Shape:
    """Return a decoder's shape."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
        "vocab_size": 131072,
        **more,
    }


def _without_names(shape: Shape) -> Shape:
    return {name: value for name, value in shape.items() if name != "architectures"}


def _latent(architecture: str, model_type: str, layers: int, hidden: int, heads: int, **more: Any) -> Shape:
    """Return the shape of a decoder with latent attention (MLA)."""
    latent = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    experts = {"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "v_head_dim": 128}
    return _decoder(architecture, model_type, layers, hidden, heads, heads, **latent, **experts, **more)


def _sparse(architecture: str, model_type: str, layers: int, hidden: int, heads: int, **more: Any) -> Shape:
    """Return the shape of a decoder with latent attention and a sparse indexer."""
    indexer = {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
    return _latent(architecture, model_type, layers, hidden, heads, **indexer, **more)


def _every(period: int, layers: int, other: str, at_period: str = "full_attention") -> list[str]:
    return [at_period if (layer + 1) % period == 0 else other for layer in range(layers)]


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128}
_VISION = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "patch_size": 16}
_MROPE = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5000000}


def _seeing(architecture: str, model_type: str, text: Shape, **more: Any) -> Shape:
    """Return the shape of a model that also sees."""
    vision = {**_VISION, "model_type": more.pop("vision_type", model_type)}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        "text_config": _without_names(text),
        "vision_config": vision,
        **more,
    }


_DELTA = {
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "decoder_sparse_step": 1,
}

SHAPES: dict[str, Shape] = {
    "Qwen3": _decoder("Qwen3ForCausalLM", "qwen3", 36, 4096, 32, 8, head_dim=128, intermediate_size=12288),
    "Qwen3-MoE": _decoder("Qwen3MoeForCausalLM", "qwen3_moe", 48, 2048, 32, 4, **_EXPERTS),
    "Llama-3.1": _decoder("LlamaForCausalLM", "llama", 80, 8192, 64, 8, intermediate_size=28672),
    "Mistral-Large": _decoder("MistralForCausalLM", "mistral", 88, 12288, 96, 8, sliding_window=None),
    "Mistral-Nemo": _decoder("MistralForCausalLM", "mistral", 40, 5120, 32, 8, head_dim=128, sliding_window=None),
    "GLM-4.6": _decoder(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        92,
        5120,
        96,
        8,
        head_dim=128,
        n_routed_experts=160,
        num_experts_per_tok=8,
        partial_rotary_factor=0.5,
        moe_intermediate_size=1536,
    ),
    "MiniMax-M2": _decoder(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        62,
        3072,
        48,
        8,
        head_dim=128,
        num_local_experts=256,
        num_experts_per_tok=8,
        rotary_dim=64,
        intermediate_size=1536,
    ),
    "Qwen3-VL": _seeing(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        _decoder("", "qwen3_vl_text", 36, 4096, 32, 8, head_dim=128, rope_scaling=_MROPE),
    ),
    "Qwen3-VL-MoE": _seeing(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        _decoder("", "qwen3_vl_moe_text", 48, 2048, 32, 4, rope_scaling=_MROPE, **_EXPERTS),
    ),
    "GLM-4.6V": _seeing(
        "Glm4vMoeForConditionalGeneration",
        "glm4v_moe",
        _decoder(
            "",
            "glm4v_moe_text",
            46,
            4096,
            96,
            8,
            head_dim=128,
            n_routed_experts=128,
            num_experts_per_tok=8,
            partial_rotary_factor=0.5,
            moe_intermediate_size=1408,
            rope_scaling={"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 500000},
        ),
    ),
    "GLM-4.6V-Flash": _seeing(
        "Glm4vForConditionalGeneration",
        "glm4v",
        _decoder(
            "",
            "glm4v_text",
            40,
            4096,
            32,
            2,
            partial_rotary_factor=0.5,
            rope_scaling={"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 500000},
        ),
    ),
    "gpt-oss": _decoder(
        "GptOssForCausalLM",
        "gpt_oss",
        36,
        2880,
        64,
        8,
        head_dim=64,
        sliding_window=128,
        num_local_experts=128,
        num_experts_per_tok=4,
        layer_types=_every(2, 36, "sliding_attention"),
    ),
    "Mellum": _decoder(
        "MellumForCausalLM",
        "mellum",
        28,
        2304,
        32,
        4,
        head_dim=128,
        sliding_window=1024,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=896,
        layer_types=_every(4, 28, "sliding_attention"),
    ),
    "Llama-4-Scout": _seeing(
        "Llama4ForConditionalGeneration",
        "llama4",
        _decoder(
            "",
            "llama4_text",
            48,
            5120,
            40,
            8,
            head_dim=128,
            attention_chunk_size=8192,
            num_local_experts=16,
            layer_types=_every(4, 48, "chunked_attention"),
        ),
        vision_type="llama4_vision_model",
    ),
    "Gemma-4": _seeing(
        "Gemma4ForConditionalGeneration",
        "gemma4",
        _decoder(
            "",
            "gemma4_text",
            60,
            5376,
            32,
            16,
            head_dim=256,
            global_head_dim=512,
            num_global_key_value_heads=4,
            sliding_window=1024,
            layer_types=_every(6, 60, "sliding_attention"),
        ),
        vision_type="gemma4_vision",
    ),
    "Step-3.5-Flash": _decoder(
        "Step3p5ForCausalLM",
        "step3p5",
        45,
        4096,
        64,
        8,
        head_dim=128,
        sliding_window=512,
        num_attention_groups=8,
        attention_other_setting={"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        layer_types=_every(4, 45, "sliding_attention"),
    ),
    "MiMo-V2-Flash": _decoder(
        "MiMoV2FlashForCausalLM",
        "mimo_v2_flash",
        48,
        4096,
        64,
        4,
        head_dim=192,
        v_head_dim=128,
        sliding_window=128,
        layer_types=_every(6, 48, "sliding_attention"),
        hybrid_layer_pattern=[(i + 1) % 6 != 0 for i in range(48)],
        swa_num_attention_heads=64,
        swa_num_key_value_heads=8,
        swa_head_dim=192,
        swa_v_head_dim=128,
        sliding_window_size=128,
    ),
    "DeepSeek-R1": _latent("DeepseekV3ForCausalLM", "deepseek_v3", 61, 7168, 128),
    "DeepSeek-V3.2": _sparse("DeepseekV32ForCausalLM", "deepseek_v32", 61, 7168, 128),
    "Kimi-K2": _latent("DeepseekV3ForCausalLM", "kimi_k2", 61, 7168, 64),
    "Kimi-K2.5": _seeing(
        "KimiK25ForConditionalGeneration", "kimi_k25", _latent("", "kimi_k2", 61, 7168, 64), vision_type="kimi_k25"
    ),
    "GLM-5": _sparse("GlmMoeDsaForCausalLM", "glm_moe_dsa", 78, 6144, 64),
    "Qwen3-Next": _decoder(
        "Qwen3NextForCausalLM", "qwen3_next", 48, 2048, 16, 2, **{**_EXPERTS, **_DELTA, "head_dim": 256}
    ),
    "Qwen3.5": _seeing(
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
        _decoder("", "qwen3_5_moe_text", 60, 4096, 32, 2, **{**_EXPERTS, **_DELTA, "head_dim": 256}),
    ),
    "Nemotron-3": _decoder(
        "NemotronHForCausalLM",
        "nemotron_h",
        52,
        2688,
        32,
        2,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        n_routed_experts=128,
        num_experts_per_tok=6,
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    ),
    "Ring-2.5": _latent(
        "BailingMoeV2_5ForCausalLM",
        "bailing_hybrid",
        80,
        8192,
        64,
        head_dim=128,
        layer_group_size=8,
        rope_scaling=None,
    ),
}
