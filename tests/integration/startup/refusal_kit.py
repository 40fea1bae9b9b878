"""What the tests of refusals share: all that is refused, tiny model configs without weights, the line of an error."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.refused_settings import REFUSED_SETTINGS

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# What follows each flag of the table on the command line, every value that is refused; a variable is set to 1.
REFUSED_VALUES: dict[str, list[str]] = {
    "--speculative-algorithm": ["EAGLE", "NGRAM"],
    "--decoupled-spec-role": ["verifier", "drafter"],
    "--dllm-algorithm": ["LowConfidence"],
    "--enable-mixed-chunk": [""],
    "--enable-two-batch-overlap": [""],
    "--enable-pdmux": [""],
    "--enable-nvidia-megakernel": [""],
    "--enable-amd-monokernel": [""],
    "--enable-torch-compile": [""],
    "--enable-mis": [""],
    "--is-embedding": [""],
    "--pp-size": ["2", "8"],
    "--moe-a2a-backend": ["pplx", "deepep_v2"],
    "--elastic-ep-backend": ["mooncake", "nixl"],
    "--elastic-ep-join-mode": ["scale", "recover"],
    "--dcp-size": ["2"],
    "--attn-cp-size": ["4"],
    "--enable-prefill-cp": [""],
    "--enable-kv-cache-sharding": [""],
    "--disaggregation-mode": ["prefill", "decode"],
    "--enable-pd-role-switch": [""],
    "--encoder-only": [""],
    "--language-only": [""],
    "--use-ray": [""],
    "SGLANG_RUST_SERVER": ["1"],
    "--smg-grpc-mode": [""],
    "--grpc-mode": [""],
    "--enable-hierarchical-cache": [""],
    "--hicache-storage-backend": ["file", "mooncake"],
    "--enable-lmcache": [""],
    "--enable-flexkv": [""],
    "--enable-unified-cache-external-linker": [""],
    "--disaggregation-decode-enable-offload-kvcache": [""],
    "--disaggregation-decode-retraction-backup": ["host_pool"],
    "--radix-cache-backend": ["flexkv", "mine"],
    "--enable-streaming-session": [""],
    "--enable-session-radix-cache": [""],
    "--enable-unified-memory": [""],
    "--enable-page-major-kv-layout": [""],
    "SGLANG_USE_HND_KVCACHE": ["1"],
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": ["1"],
    "--enable-hisparse": [""],
    "--prefill-only-disable-kv-cache": [""],
    "--kv-cache-dtype": ["mxfp8", "nvfp4", "fp4_mx_block16"],
    "--enable-return-routed-experts": [""],
    "--enable-return-indexer-topk": [""],
    "--kv-canary": ["log", "raise"],
    "SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE": ["1"],
    "SGLANG_KV_CANARY_ENABLE_VERIFY_TOKEN_ASSERT": ["1"],
    "--device": ["xpu", "hpu", "npu", "musa", "mps"],
    "--attention-backend": ["flex_attention", "trtllm_mla", "aiter", "wave", "hpc_ops", "flashmla", "dsa", "ascend"],
    "--prefill-attention-backend": ["aiter", "flex_attention"],
    "--decode-attention-backend": ["aiter", "flex_attention"],
}
# What a flag is refused beside.
REFUSED_BESIDE = {"--moe-a2a-backend": "--tp-size 2 --attn-dp-size 2"}
REFUSED_CASES = [
    (refusal, value) for refusal in REFUSED_SETTINGS for value in REFUSED_VALUES.get(refusal.setting, ["missing"])
]

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
REFUSED_MODELS = [
    ("LlamaForSequenceClassification", transformers.LlamaConfig(**TINY), "does not generate"),
    ("WhisperForConditionalGeneration", transformers.WhisperConfig(), "encoder's cache"),
    ("SDARForCausalLM", transformers.Qwen3Config(**TINY), "attend to later ones"),
    ("Mamba2ForCausalLM", transformers.Mamba2Config(num_heads=8, head_dim=16, hidden_size=64), "recurrent state"),
    ("Qwen3NextForCausalLM", transformers.Qwen3NextConfig(**TINY), "recurrent state"),
    ("DeepseekV3ForCausalLM", transformers.DeepseekV3Config(**{**TINY, "num_key_value_heads": 4}), "is MLA"),
    ("UnlimitedOCRForCausalLM", transformers.LlamaConfig(**TINY), "second pool, and have not been shown right in one"),
    (
        "Gemma4ForCausalLM",
        transformers.LlamaConfig(**TINY, swa_head_dim=8, swa_num_key_value_heads=2),
        "number or size of their KV heads",
    ),
    (
        "MiMoV2FlashForCausalLM",
        transformers.LlamaConfig(**TINY, swa_num_key_value_heads=4, hybrid_layer_pattern=[0, 1, 1, 0]),
        "number or size of their KV heads",
    ),
    (
        "Step3p5ForCausalLM",
        transformers.LlamaConfig(
            **TINY,
            layer_types=["full_attention", "sliding_attention"] * 2,
            sliding_window=16,
            attention_other_setting={"num_attention_heads": 8, "num_attention_groups": 2},
        ),
        "number of their query heads",
    ),
    ("Llama4ForCausalLM", transformers.Llama4TextConfig(**TINY), "attend to chunks"),
    ("Gemma2ForCausalLM", transformers.Gemma2Config(**TINY), "latest 4096 tokens: set --kv-budget to at least that"),
    ("MiniMaxForCausalLM", transformers.MiniMaxConfig(**TINY), "type linear_attention"),
    ("Qwen2ForCausalLM", transformers.Qwen2Config(**TINY, dual_chunk_attention_config={}), "dual chunk attention"),
    (
        "GlmImageForConditionalGeneration",
        transformers.Qwen2_5_VLConfig(text_config={**TINY, "rope_parameters": MROPE, "vision_vocab_size": 16}),
        "an image's places",
    ),
    ("LlamaForCausalLM", transformers.LlamaConfig(**TINY, use_ngram_embedding=True, ngram_embedding_n=2), "n-gram"),
]


def tiny_config_dir(folder: Path, config: Any, architecture: str) -> str:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return str(folder)


def message_of(check: Any, *args: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        check(*args)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    return message
