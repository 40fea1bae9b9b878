"""A configuration stands for its model: whatever code reads it, in whatever format, under whatever name."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from transformers import dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rkv_sglang.integration.doctor.launch import check_command

CODE = """
from transformers import PretrainedConfig


class TheirConfig(PretrainedConfig):
    model_type = "of_their_own"
"""
PLAIN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "of_their_own",
    "auto_map": {"AutoConfig": "configuration_theirs.TheirConfig"},
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "max_position_embeddings": 4096,
    "vocab_size": 256,
    "torch_dtype": "bfloat16",
}
SLIDING = {
    **PLAIN,
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "sliding_window": 512,
    "num_attention_groups": 2,
    "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2, "head_dim": 16},
    "head_dim": 16,
    # Two more than layers.
    "layer_types": ["full_attention", "sliding_attention"] * 3,
}
SEEING = {
    **PLAIN,
    "architectures": ["InternS1ForConditionalGeneration"],
    "text_config": {**PLAIN, "model_type": "qwen3_moe"},
    "vision_config": {"hidden_size": 32},
}
MISTRAL = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "head_dim": 32,
    "hidden_dim": 64,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "norm_eps": 1e-6,
    "vocab_size": 256,
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    "moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "expert_hidden_dim": 32},
}


def judged(command: str, model_config: Path | None = None) -> list[str]:
    out = io.StringIO()
    check_command(command, str(model_config) if model_config else None, out)
    return out.getvalue().splitlines()


def written(folder: Path, config: dict[str, object], name: str = "config.json") -> Path:
    (folder / name).write_text(json.dumps(config))
    return folder / name


@pytest.mark.parametrize("config", [PLAIN, SLIDING, SEEING], ids=["plain", "sliding", "seeing"])
def test_without_a_models_code_a_launch_is_judged_as_with_it(tmp_path, monkeypatch, config):
    # Where transformers copies code to.
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "model").mkdir()
    file = written(tmp_path / "model", config)
    (tmp_path / "model" / "configuration_theirs.py").write_text(CODE.replace("of_their_own", config["model_type"]))
    command = f"sglang serve {tmp_path}/model --trust-remote-code"
    for policy in ("rkv", "random_attention --kv-window 512"):
        with_code = judged(f"{command} --kv-policy {policy}")
        assert judged(f"{command} --kv-policy {policy}", file) == with_code
        is_refused = config is SLIDING and policy == "rkv"
        assert ("its layers differ in the number of their query heads" in with_code[0]) == is_refused, with_code
        assert is_refused or with_code[0].startswith("would start with"), with_code
    # All is as before: one kind is unknown, one is transformers' own, and those of SGLang are there.
    assert "of_their_own" not in CONFIG_MAPPING and "kimi_k3" in CONFIG_MAPPING
    assert CONFIG_MAPPING["step3p5"].__module__.startswith("transformers.")


def test_code_that_is_not_trusted_is_asked_for_as_by_sglang(tmp_path):
    (line,) = judged("sglang serve meta/theirs --kv-policy rkv", written(tmp_path, PLAIN))
    assert line.startswith("--model-path meta/theirs has no usable configuration here (")
    assert "trust_remote_code" in line


def test_mistrals_own_format_is_read_where_the_models_name_asks_for_it(tmp_path):
    file = written(tmp_path, MISTRAL, "params.json")
    for name, is_read in (("mistralai/Mistral-Small-4-119B", True), ("mistralai/other", False)):
        line = judged(f"sglang serve {name} --kv-policy rkv", file)[0]
        assert ("its attention is MLA" in line) == is_read, line
        assert line.startswith(f"--model-path {name} ")


@pytest.mark.parametrize("name", ["..", "/", "a b/c=d", "\u00fcber/" + "m" * 300, "x.gguf", "~", "."])
def test_any_name_will_do(tmp_path, name):
    config = {**PLAIN, "model_type": "qwen3_moe"}
    del config["auto_map"]
    with contextlib.chdir(tmp_path):
        (line,) = judged(f"sglang serve '{name}' --kv-policy rkv", written(tmp_path, config))
    assert line.startswith("would start with --kv-policy rkv"), line
