"""A launch is judged for a GPU that is not here."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache import kv_cache_dtype

from rkv_sglang.integration.doctor.hardware import AMD, HARDWARE, fp8_problems
from rkv_sglang.integration.doctor.launch import check_command
from rkv_sglang.integration.startup.refused_settings import KV_CACHE_DTYPES
from rkv_sglang.kernels.paged_batch import KEY_DTYPES

# Of AMD's GPUs by their architecture, the only one on which SGLang takes fp8 to be of AMD's own format.
GFX94 = ("MI300X", "MI325X")
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "bfloat16",
}
SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}
ASKING = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": SCHEME}


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("asks_for_fp8", [False, True])
@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)
def test_fp8_is_refused_where_its_pool_would_be(monkeypatch, hardware, asks_for_fp8, dtype):
    own = torch.float8_e4m3fnuz if hardware in GFX94 else torch.float8_e4m3fn
    monkeypatch.setattr(kv_cache_dtype, "_is_hip", hardware in AMD)
    monkeypatch.setattr(kv_cache_dtype, "fp8_dtype", own)
    monkeypatch.setattr(kv_cache_dtype, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    asked = SimpleNamespace(kv_cache_quant_algo="FP8" if asks_for_fp8 else None)
    _, stored = kv_cache_dtype.configure_kv_cache_dtype(
        server_args_kv_cache_dtype=dtype,
        model=SimpleNamespace(quant_config=asked),
        model_dtype=torch.bfloat16,
        is_draft_worker=False,
        is_dflash=False,
        speculative_draft_attention_backend="",
    )
    args = SimpleNamespace(kv_cache_dtype=dtype, kv_policy="rkv")
    problems = list(fp8_problems(args, hardware, asks_for_fp8=asks_for_fp8))
    assert len(problems) == (stored not in KEY_DTYPES)
    assert list(fp8_problems(args, None, asks_for_fp8=asks_for_fp8)) == []


@pytest.mark.parametrize("hardware", ["MI300X", "MI350X"])
def test_the_doctor_says_so_of_a_flag_and_of_a_checkpoint(tmp_path, hardware):
    file = tmp_path / "config.json"
    for config, flags in ((CONFIG, "--kv-cache-dtype fp8_e4m3"), ({**CONFIG, "quantization_config": ASKING}, "")):
        file.write_text(json.dumps(config))
        out = io.StringIO()
        command = f"sglang serve meta/some-8b --kv-policy rkv --attention-backend triton {flags}"
        status = check_command(command, str(file), out, hardware=hardware)
        (line,) = out.getvalue().splitlines()
        assert status == (hardware in GFX94), line
        dtype = flags.split()[-1] if flags else "auto"
        refusal = f"--kv-cache-dtype {dtype} cannot be combined with --kv-policy rkv: on {hardware} the KV pool would"
        assert line.startswith(refusal if status else "would start with")
