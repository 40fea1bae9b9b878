"""Parts that shapes of models are put together from."""

from typing import Any

Shape = dict[str, Any]


def decoder(
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


def latent(architecture: str, model_type: str, layers: int, hidden: int, heads: int, **more: Any) -> Shape:
    """Return the shape of a decoder with latent attention (MLA)."""
    sizes = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    experts = {"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "v_head_dim": 128}
    return decoder(architecture, model_type, layers, hidden, heads, heads, **sizes, **experts, **more)


def sparse(architecture: str, model_type: str, layers: int, hidden: int, heads: int, **more: Any) -> Shape:
    """Return the shape of a decoder with latent attention and a sparse indexer."""
    indexer = {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
    return latent(architecture, model_type, layers, hidden, heads, **indexer, **more)


def every(period: int, layers: int, other: str) -> list[str]:
    """Return the kinds of layers of which the last of each period attends to all tokens."""
    return ["full_attention" if (layer + 1) % period == 0 else other for layer in range(layers)]


EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128}
_VISION = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "patch_size": 16}
MROPE = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5000000}


def seeing(architecture: str, model_type: str, text: Shape, **more: Any) -> Shape:
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


DELTA = {
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "decoder_sparse_step": 1,
}


def with_code(shape: Shape, where: str) -> Shape:
    """Return the shape of a model that brings code of its own to read it, in the class ``where``."""
    return {**shape, "auto_map": {"AutoConfig": where}}
