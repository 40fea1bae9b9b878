"""Shapes of models that keep something else than keys and values of every token: latent vectors, recurrent states."""

from devtools.model_shapes.builders import DELTA, EXPERTS, Shape, decoder, latent, seeing, sparse

_HYBRID = {**EXPERTS, **DELTA, "head_dim": 256}
_KIMI_K2_5 = seeing(
    "KimiK25ForConditionalGeneration", "kimi_k25", latent("", "kimi_k2", 61, 7168, 64), vision_type="kimi_k25"
)


def _qwen3_5(layers: int, hidden: int, heads: int) -> Shape:
    text = decoder("", "qwen3_5_moe_text", layers, hidden, heads, 2, **_HYBRID)
    return seeing("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", text)


def _nemotron(hidden: int, pattern: str) -> Shape:
    """Return the shape of a model with one layer for each letter: of a state (M), of experts (E), of attention (*)."""
    return decoder(
        "NemotronHForCausalLM",
        "nemotron_h",
        len(pattern),
        hidden,
        32,
        2,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        n_routed_experts=128,
        num_experts_per_tok=6,
        hybrid_override_pattern=pattern,
    )


COMPRESSED: dict[str, Shape] = {
    "DeepSeek-R1": latent("DeepseekV3ForCausalLM", "deepseek_v3", 61, 7168, 128),
    "DeepSeek-V3.2": sparse("DeepseekV32ForCausalLM", "deepseek_v32", 61, 7168, 128),
    "DeepSeek-Math-V2": sparse("DeepseekV32ForCausalLM", "deepseek_v32", 61, 7168, 128),
    "Mistral-Small-4": {
        # Mistral's own params.json, which SGLang reads of this model.
        "dim": 4096,
        "n_layers": 36,
        "n_heads": 32,
        "n_kv_heads": 32,
        "head_dim": 128,
        "hidden_dim": 12288,
        "kv_lora_rank": 256,
        "q_lora_rank": 1024,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": 131072,
        "max_position_embeddings": 1048576,
        "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
        "yarn": {"original_max_position_embeddings": 8192, "factor": 128, "apply_scale": False, "beta": 32, "alpha": 1},
        "moe": {
            "num_experts": 128,
            "num_experts_per_tok": 4,
            "num_shared_experts": 1,
            "expert_hidden_dim": 2048,
            "first_k_dense_replace": 0,
            "route_every_n": 1,
            "routed_scale": 1.0,
            "num_expert_groups": 1,
            "num_expert_groups_per_tok": 1,
        },
        "vision_encoder": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
    },
    "Kimi-K2": latent("DeepseekV3ForCausalLM", "kimi_k2", 61, 7168, 64),
    "Kimi-K2.5": _KIMI_K2_5,
    "Kimi-K2.6": _KIMI_K2_5,
    "GLM-5": sparse("GlmMoeDsaForCausalLM", "glm_moe_dsa", 78, 6144, 64),
    "GLM-5.1": sparse("GlmMoeDsaForCausalLM", "glm_moe_dsa", 78, 6144, 64),
    "Qwen3-Next": decoder("Qwen3NextForCausalLM", "qwen3_next", 48, 2048, 16, 2, **_HYBRID),
    "Qwen3-Coder-Next": decoder("Qwen3NextForCausalLM", "qwen3_next", 48, 2048, 16, 2, **_HYBRID),
    "Qwen3.5": _qwen3_5(60, 4096, 32),
    "Qwen3.6": _qwen3_5(40, 2048, 16),
    "Nemotron-3-Nano": _nemotron(2688, "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
    "Nemotron-3-Super": _nemotron(4096, "MEMEMEMEM*E" * 8),
    "Ring-2.5": latent(
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
