"""A KV pool in fp8: the server answers as a dense cache that rounds keys and values, by the factors of each layer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, outputs_at_restores, retracting, six_prompts
from tests.support.harness.gate import Control
from tests.support.harness.scheduler import RunResult, rid_of, run_scheduler
from tests.support.oracle.decoder import Fp8
from tests.support.oracle.dense import DenseResult, dense_generate

MODEL = tiny_model_path("llama-gqa")
SCALES = ((0.25, 0.02), (0.03, 0.125))
DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_SCHEME = {"type": "float", "num_bits": 8, "dynamic": False}
_MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*"]}
# Of nothing but the KV: what quantised weights are multiplied by, SGLang has for GPUs only.
ASKING_FOR_FP8 = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {**_SCHEME, "strategy": "tensor", "symmetric": True},
    },
    "modelopt": {**_MODELOPT, "kv_cache_scheme": _SCHEME},
    "modelopt-by-name": {**_MODELOPT, "kv_cache_quant_algo": "FP8"},
}


def run(dtype: str, setting: Setting, requests: list, *flags: str, model: Path = MODEL, **options: object) -> RunResult:
    scales = ",".join(f"{k}:{v}" for k, v in SCALES) if model == MODEL else "checkpoint"
    env = {"RKV_STAND_IN_FP8": scales, **options.pop("env", {})}  # type: ignore[dict-item]
    flags = ("--model-path", str(model), "--kv-cache-dtype", dtype, *setting.flags, *flags)
    result = run_scheduler(list(flags), requests, env=env, **options)  # type: ignore[arg-type]
    result.assert_clean()
    return result


def expected_of(
    prompt: tuple,
    found: list[int],
    dtype: str,
    setting: Setting,
    *,
    factor: float = 1,
    shaken: torch.Generator | None = None,
    **options: object,
) -> DenseResult:
    scales = tuple((factor * k, factor * v) for k, v in SCALES)
    return dense_generate(
        MODEL,
        prompt,
        len(found),
        budget=setting.budget,
        buffer=setting.buffer,
        window=setting.window,
        score=setting.score,
        block=setting.block,
        fp8=Fp8(DTYPES[dtype], scales, shaken),
        guessed_output_ids=found,
        **options,  # type: ignore[arg-type]
    )


def assert_answer(
    found: list[int], name: str, prompt: tuple, dtype: str, setting: Setting, **options: object
) -> DenseResult:
    """Assert the oracle's answer and return it. Of some thousand numbers one is always half-way between two of fp8.

    So where answers part the oracle is asked again, with errors as another order of summation has them: if it does not
    answer so far as it did, which inputs are drawn shows nothing.
    """
    expected = expected_of(prompt, found, dtype, setting, **options)  # type: ignore[arg-type]
    parts = [i for i, pair in enumerate(zip(found, expected.output_ids, strict=True)) if pair[0] != pair[1]]
    for seed in range(4) if parts else ():
        shaken = torch.Generator().manual_seed(seed)
        again = expected_of(prompt, expected.output_ids, dtype, setting, shaken=shaken, **options)  # type: ignore[arg-type]
        if again.output_ids[: parts[0] + 1] != expected.output_ids[: parts[0] + 1]:
            pytest.skip(f"{name}: how a number is rounded decides token {parts[0]}")
    assert_same_tokens(found, expected, name)
    return expected


@pytest.mark.parametrize(
    ("dtype", "policy", "block", "page_size"),
    [("fp8_e5m2", "keydiff", 16, 16), ("fp8_e4m3", "snapkv", 16, 1), ("fp8_e5m2", "rkv", None, 16)],
    ids=["e5m2-blocks", "e4m3-blocks", "e5m2-heads"],
)
def test_tokens_equal_those_of_a_dense_cache_that_rounds(dtype, policy, block, page_size):
    """Whole blocks go, or what is moved is each head's own; the latter in e4m3 is compared below."""
    setting = Setting(budget=75, buffer=32, policy=policy, block=block)
    prompts = six_prompts()[1:3]
    requests = [greedy(prompt, setting.budget + 3 * setting.buffer + 5) for prompt in prompts]
    result = run(dtype, setting, requests, "--page-size", str(page_size))
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        expected = assert_answer(output.output_ids, f"request {i}", prompt, dtype, setting)
        assert len(expected.compactions) == 3


def test_factors_follow_new_weights():
    """Those of R-KV's similarity cancel out, and those of attention's logits do not."""
    setting, prompt = Setting(budget=24, buffer=16, policy="snapkv"), six_prompts()[4]
    requests = [greedy(prompt, 70), greedy(prompt, 70, at_step=130)]
    fields = {"model_path": str(MODEL), "load_format": "auto", "flush_cache": True}
    update = Control(100, "UpdateWeightFromDiskReqInput", fields)
    result = run("fp8_e4m3", setting, requests, controls=[update])
    for i, factor in enumerate((1, 2)):
        name, found = f"with {factor} times the factors", result.outputs[i].output_ids
        expected = assert_answer(found, name, prompt, "fp8_e4m3", setting, factor=factor)
        assert len(expected.compactions) == 2


def checkpoint(folder: Path, asking: dict[str, Any], factor: float) -> Path:
    """Make a copy of the model that asks for fp8 KV and brings so many times the factors for it."""
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": asking}))
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    for layer, scales in enumerate(SCALES):
        for name, scale in zip("kv", scales, strict=True):
            owner = f"{name}_proj." if asking["quant_method"] == "modelopt" else ""
            weights[f"model.layers.{layer}.self_attn.{owner}{name}_scale"] = torch.tensor(factor * scale)
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ASKING_FOR_FP8)
def test_a_checkpoint_that_asks_for_fp8_gets_it_with_its_own_factors(name, tmp_path):
    """Nobody says so on the command line, and new weights bring others."""
    setting, prompt = Setting(budget=24, buffer=16, policy="snapkv"), six_prompts()[4]
    first, second = (checkpoint(tmp_path / str(factor), ASKING_FOR_FP8[name], factor) for factor in (1, 2))
    requests = [greedy(prompt, 70), greedy(prompt, 70, at_step=130)]
    fields = {"model_path": str(second), "load_format": "auto", "flush_cache": True}
    update = Control(100, "UpdateWeightFromDiskReqInput", fields)
    result = run("auto", setting, requests, model=first, controls=[update])
    assert "dtype: torch.float8_e4m3fn, " in result.log
    for i, factor in enumerate((1, 2)):
        found = result.outputs[i].output_ids
        expected = assert_answer(found, f"{name}, {factor}", prompt, "fp8_e4m3", setting, factor=factor)
        assert len(expected.compactions) == 2


def test_a_preempted_request_comes_back_with_its_bytes():
    setting, (num_slots, interval) = Setting(budget=24, buffer=16), (182, 157)
    prompts = [prompt[:length] for prompt, length in zip(six_prompts()[3:], (30, 5, 22), strict=True)]
    num_tokens = interval + 50
    requests = [greedy(prompt, num_tokens) for prompt in prompts]
    result = run("fp8_e4m3", setting, requests, "--max-total-tokens", str(num_slots), env=retracting(interval))
    restores = [outputs_at_restores(result, rid_of(i)) for i in range(3)]
    assert any(restores)
    for i, prompt in enumerate(prompts):
        assert_answer(
            result.outputs[i].output_ids,
            f"request {i}, back {restores[i]}",
            prompt,
            "fp8_e4m3",
            setting,
            restore_at=restores[i],
            restored_in_flight=True,
        )
