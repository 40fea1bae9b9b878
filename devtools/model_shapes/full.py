"""Shapes of models all of whose layers attend to all tokens, by heads of their own."""

from devtools.model_shapes.builders import EXPERTS, MROPE, Shape, decoder, seeing, with_code

_MINIMAX_M2 = decoder(
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
)

FULL: dict[str, Shape] = {
    "Qwen3": decoder("Qwen3ForCausalLM", "qwen3", 36, 4096, 32, 8, head_dim=128, intermediate_size=12288),
    "Qwen3-MoE": decoder("Qwen3MoeForCausalLM", "qwen3_moe", 48, 2048, 32, 4, **EXPERTS),
    "Llama-3.1": decoder("LlamaForCausalLM", "llama", 80, 8192, 64, 8, intermediate_size=28672),
    "Mistral-Large": decoder("MistralForCausalLM", "mistral", 88, 12288, 96, 8, sliding_window=None),
    "Mistral-Nemo": decoder("MistralForCausalLM", "mistral", 40, 5120, 32, 8, head_dim=128, sliding_window=None),
    "Mistral-Small-3": decoder("MistralForCausalLM", "mistral", 40, 5120, 32, 8, head_dim=128, sliding_window=None),
    "GLM-4.6": decoder(
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
    "MiniMax-M2": _MINIMAX_M2,
    "Qwen3-VL": seeing(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        decoder("", "qwen3_vl_text", 36, 4096, 32, 8, head_dim=128, rope_scaling=MROPE),
    ),
    "Qwen3-VL-MoE": seeing(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        decoder("", "qwen3_vl_moe_text", 48, 2048, 32, 4, rope_scaling=MROPE, **EXPERTS),
    ),
    "GLM-4.6V": seeing(
        "Glm4vMoeForConditionalGeneration",
        "glm4v_moe",
        decoder(
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
    "GLM-4.6V-Flash": seeing(
        "Glm4vForConditionalGeneration",
        "glm4v",
        decoder(
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
    "MiniMax-M2.7": _MINIMAX_M2,
    "Intern-S1": with_code(
        seeing(
            "InternS1ForConditionalGeneration",
            "interns1",
            decoder("Qwen3MoeForCausalLM", "qwen3_moe", 94, 4096, 64, 4, **{**EXPERTS, "moe_intermediate_size": 1536}),
            vision_type="interns1_vision",
        ),
        "configuration_interns1.InternS1Config",
    ),
    # It writes blocks of tokens by diffusion.
    "LLaDA-2.1": with_code(
        decoder(
            "LLaDA2MoeModelLM",
            "llada2_moe",
            20,
            2048,
            16,
            4,
            **{**EXPERTS, "num_experts": 256, "moe_intermediate_size": 512},
            partial_rotary_factor=0.5,
        ),
        "configuration_llada2_moe.LLaDA2MoeConfig",
    ),
}
