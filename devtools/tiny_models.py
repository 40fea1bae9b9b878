"""Models the tests can have without a network: tiny random ones, made on first use, and the real small one.

A tiny model is a fp32 checkpoint with a tokenizer, in ``.cache/models`` under a name that carries a hash of all it was
made from. Every token of the tokenizer is plain ASCII, so any output is text, and stop strings and grammars can hit.
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MellumConfig,
    MellumForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

MODELS_DIR = Path(__file__).resolve().parents[1] / ".cache" / "models"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = 512
# Raise it when what a folder holds changes in a way that neither config nor seed shows.
_FORMAT = 1

_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32768,
    # The usual 0.02 makes all logits alike at this size, and greedy output collapses into a loop of one token.
    "initializer_range": 0.2,
    "rope_parameters": _ROPE,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
MLA_MODEL = "deepseek-v2"
# The model of the benchmarks, as it was in all that they measured: the Llama of the tests with a layer more.
BENCHMARK_MODEL = "llama-gqa-3"
# Positions of three numbers, and images in prompts.
IMAGE_MODEL = "qwen2.5-vl"
IMAGE_TOKEN_ID = VOCAB_SIZE - 1
SINKS_MODEL = "gpt-oss"
# Tokens that a layer attends to which attends to the latest alone, its own included.
SLIDING_WINDOW = 24
SLIDING, FULL = "sliding_attention", "full_attention"
# Transformers reads those of each kind of layer, SGLang that of all.
_ROPE_OF_EACH = {**_ROPE, SLIDING: _ROPE, FULL: _ROPE}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_OLMO3: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": SLIDING_WINDOW,
    "rope_parameters": _ROPE_OF_EACH,
}
_GQA: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
# name: (config class, model class, own settings, seed)
_RECIPES: dict[str, tuple[type, type, dict[str, Any], int]] = {
    "llama-gqa": (LlamaConfig, LlamaForCausalLM, _GQA, 0),
    BENCHMARK_MODEL: (LlamaConfig, LlamaForCausalLM, _GQA | {"num_hidden_layers": 3}, 0),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, _GQA, 0),
    "llama-mqa": (LlamaConfig, LlamaForCausalLM, _GQA | {"num_key_value_heads": 1}, 0),
    "llama-mha-48": (LlamaConfig, LlamaForCausalLM, _GQA | {"num_key_value_heads": 4, "head_dim": 48}, 0),
    MLA_MODEL: (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        {
            # What SGLang's kernels of latent attention expect.
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "q_lora_rank": None,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            # Every layer is dense.
            "first_k_dense_replace": 99,
            "moe_layer_freq": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 2048,
            },
        },
        0,
    ),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM, _OLMO3 | {"layer_types": [SLIDING, FULL, SLIDING]}, 0),
    "olmo3-sliding": (Olmo3Config, Olmo3ForCausalLM, _OLMO3 | {"layer_types": [SLIDING] * 3}, 0),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            **_GQA,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 48,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": [FULL, SLIDING, SLIDING],
            # SGLang ties them anyway, so a token's embedding must not be the largest part of what comes out.
            "tie_word_embeddings": True,
            "initializer_range": 0.05,
            "rope_parameters": {
                SLIDING: _ROPE,
                FULL: {"rope_type": "default", "rope_theta": 1000000.0},
            },
        },
        0,
    ),
    # One for which SGLang makes a second pool by itself.
    "mellum": (
        MellumConfig,
        MellumForCausalLM,
        {
            **_GQA,
            "num_hidden_layers": 3,
            **_EXPERTS,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": [SLIDING, FULL, SLIDING],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "rope_parameters": {SLIDING: _ROPE, FULL: {"rope_type": "default", "rope_theta": 500000.0}},
        },
        0,
    ),
    # Attention sinks, and experts with biases.
    SINKS_MODEL: (
        GptOssConfig,
        GptOssForCausalLM,
        {
            **_GQA,
            "num_hidden_layers": 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": [SLIDING, FULL, SLIDING],
        },
        0,
    ),
    IMAGE_MODEL: (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        {
            "text_config": _SHARED
            | {
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [0],
            },
            "image_token_id": IMAGE_TOKEN_ID,
            "video_token_id": IMAGE_TOKEN_ID - 1,
            "vision_start_token_id": IMAGE_TOKEN_ID - 2,
            "vision_end_token_id": IMAGE_TOKEN_ID - 3,
            "tie_word_embeddings": False,
        },
        0,
    ),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, _GQA | _EXPERTS, 0),
    # A head_dim of 32, and logits a third of what that makes of them elsewhere.
    "granite-scaled": (
        GraniteConfig,
        GraniteForCausalLM,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_multiplier": 0.06},
        0,
    ),
}
# Of different shapes; the others differ from one of these in one number.
TINY_MODELS = ("llama-gqa", "qwen3", "llama-mqa", "llama-mha-48")


def small_model_path() -> Path:
    """Return the folder of SmolLM2-135M-Instruct (30 layers, 9 query and 3 KV heads, head_dim 64).

    Raises:
        FileNotFoundError: The folder is missing; the message names the command that makes it.
    """
    path = MODELS_DIR / "SmolLM2-135M-Instruct"
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"no model in {path}: run `make setup`")
    return path


@cache
def tiny_model_path(name: str) -> Path:
    """Return the folder of a tiny random model, such as one of ``TINY_MODELS``; made when it is not there yet.

    A folder is complete or absent, whatever other processes do at the same time: it is written under another name and
    renamed at the end; who comes second uses the folder of who came first.

    Raises:
        KeyError: The name is none of these.
    """
    config_class, model_class, settings, seed = _RECIPES[name]
    # A model of images has its own settings of the language part.
    # Copies: some configurations change what they are made with.
    config = config_class(**copy.deepcopy(settings if "text_config" in settings else _SHARED | settings))
    made_from = [_FORMAT, seed, torch.__version__, transformers.__version__, config.to_dict()]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:12]
    target = MODELS_DIR / f"tiny-{name}-{digest}"
    if target.exists():
        return target
    MODELS_DIR.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=MODELS_DIR))
    try:
        _write_model(model_class, config, seed, partial)
        partial.chmod(0o755)
        os.rename(partial, target)
    except OSError:
        # A folder cannot be renamed onto one that is not empty: another process was faster.
        if not target.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_model(model_class: type, config: Any, seed: int, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32).eval()
        with torch.no_grad():
            # Norms start as ones, and a norm left out or applied twice would go unseen.
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:
                    parameter.uniform_(0.5, 2.0)
                elif parameter_name.endswith("sinks"):
                    # As much as a token of some weight, in the 16 bits in which SGLang holds them.
                    parameter.uniform_(0.0, 3.0).copy_(parameter.bfloat16())
                elif config.model_type == "gpt_oss" and parameter_name.endswith("bias"):
                    parameter.normal_(std=0.2)
    # Without this file a server would take its sampling defaults from elsewhere.
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 512 tokens: 3 special, newline, printable ASCII, then pairs of letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    # Byte-level BPE writes newline and space as these two letters.
    singles = ["\u010a", "\u0120", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    tokens = ["<pad>", "<bos>", "<eos>", *singles]
    pairs = [("\u0120", letter) for letter in letters] + [(left, right) for left in letters for right in letters]
    merges = pairs[: VOCAB_SIZE - len(tokens)]
    tokens += [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template="{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}",
    )
