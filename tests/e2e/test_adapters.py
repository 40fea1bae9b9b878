"""LoRA: requests with an adapter are compacted as the merged model would be, preempted and restored ones too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.lora.lora_registry import LoRARef

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, outputs_at_restores, six_prompts
from tests.support.harness.gate import Control
from tests.support.harness.scheduler import rid_of, run_scheduler
from tests.support.oracle.dense import dense_generate

MODEL = tiny_model_path("llama-gqa")
SETTING = Setting(budget=21, buffer=12)
RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
NAME = "adapter"
# The first outgrows the pool and is preempted after so many tokens.
LENGTHS, PAUSE = (160, 40, 40), 130


@pytest.fixture
def adapter(tmp_path: Path, seed: int) -> tuple[Path, Path]:
    """Return the folder of a random adapter, and that of the model with it merged into its weights."""
    torch.manual_seed(seed)
    folder, merged = tmp_path / NAME, tmp_path / "merged"
    shutil.copytree(MODEL, merged)
    folder.mkdir()
    (file,) = merged.glob("*.safetensors")
    weights, parts = load_file(file), {}
    for name, weight in weights.items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in TARGETS:
            down, up = 0.1 * torch.randn(RANK, weight.shape[1]), 0.1 * torch.randn(weight.shape[0], RANK)
            parts |= {
                f"base_model.model.{layer}.{kind}.lora_{which}.weight": part for which, part in (("A", down), ("B", up))
            }
            weights[name] = weight + up @ down * (ALPHA / RANK)
    save_file(weights, file, metadata={"format": "pt"})
    save_file(parts, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)}
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(MODEL), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, merged


def test_tokens_are_those_of_the_merged_model_over_a_restore(adapter: tuple[Path, Path]) -> None:
    folder, merged = adapter
    lora_id = LoRARef.deterministic_id(NAME, str(folder))
    prompt, other = six_prompts()[5][:40], six_prompts()[2][:30]
    # The third has the prompt of the first, and no adapter: it must find nothing of it in the prefix cache.
    requests = [
        greedy(prompt, LENGTHS[0], extra={"lora_id": lora_id}),
        greedy(other, LENGTHS[1], extra={"lora_id": lora_id}),
        greedy(prompt, LENGTHS[2], at_step=20),
    ]
    controls = [
        Control(0, "PauseGenerationReqInput", {"mode": "retract"}, after_tokens=(rid_of(0), PAUSE)),
        Control(0, "ContinueGenerationReqInput", {"torch_empty_cache": False}, wait=3),
    ]
    flags = ["--model-path", str(MODEL), "--max-total-tokens", "160", *SETTING.flags]
    flags += ["--enable-lora", "--lora-paths", f"{NAME}={folder}", "--lora-backend", "torch_native"]
    result = run_scheduler(flags, requests, controls=controls, env={"RKV_STAND_IN_PINNING": "1"})
    result.assert_clean()
    restores = outputs_at_restores(result, rid_of(0))
    assert len(restores) == 1
    for i, (request, output) in enumerate(zip(requests, result.outputs, strict=True)):
        expected = dense_generate(
            merged if i < 2 else MODEL,
            tuple(request.input_ids),
            LENGTHS[i],
            budget=SETTING.budget,
            buffer=SETTING.buffer,
            restore_at=restores if i == 0 else [],
            restored_in_flight=True,
            guessed_output_ids=tuple(output.output_ids),
        )
        assert_same_tokens(output.output_ids, expected, f"request {i}")
        assert output.info["kv_compactions"] == len(expected.compactions) > 0
    assert result.outputs[2].cached_tokens == 0
