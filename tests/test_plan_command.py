"""The plan's table is arithmetic on a model's configuration."""

import copy
import json
import random
from pathlib import Path

import pytest
from sglang.srt.layers.quantization import get_quantization_config

from rkv_sglang import cli

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}


def test_plan_of_llama_8b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert cli.main(["doctor", "--plan", "--model-path", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "128 KiB of KV per token" in out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "GiB |" in line]
    # 8 GiB are 65,536 tokens: 3 of 16,896, and with 1.4 % for the queries 38 of 1,664.
    assert rows[0] == ["8 GiB", "3", "55 (18.3x)", "38 (12.7x)", "24 (8.0x)"]
    assert [row[0] for row in rows] == ["8 GiB", "24 GiB", "60 GiB"]


def test_what_looks_at_nothing_takes_nothing_beside_the_cache(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    counts = {}
    for policy, granularity in (("rkv", "head"), ("rkv", "request"), ("random_attention", "request")):
        flags = ["--policy", policy, "--granularity", granularity, "--kv-gib", "8", "--budget", "1024"]
        assert cli.main(["doctor", "--plan", "--model-path", str(tmp_path), *flags]) == 0
        out = capsys.readouterr().out
        assert ("; nothing beside the cache" in out) == (policy == "random_attention")
        counts[policy, granularity] = out.splitlines()[-1].split("|")[3].split()[0]
    # 65,536 tokens of 1,664 a request; with the queries of the window, 1.4 % fewer.
    assert list(counts.values()) == ["38", "38", "39"]
    assert cli.main(["doctor", "--plan", "--model-path", str(tmp_path), *flags, "--buffer", "100"]) == 1
    assert capsys.readouterr().err.endswith("--granularity request drops together: set --buffer 112\n")


def _kib_per_token(folder: Path, capsys: pytest.CaptureFixture[str], quantization: object, *flags: str) -> str:
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, "quantization_config": quantization}))
    assert cli.main(["doctor", "--plan", "--model-path", str(folder), *flags]) == 0
    return capsys.readouterr().out.split(" KiB")[0]


def test_a_checkpoint_that_asks_for_fp8_takes_half(tmp_path, capsys) -> None:
    scheme = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}
    asking = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    assert _kib_per_token(tmp_path, capsys, asking) == "64"
    assert _kib_per_token(tmp_path, capsys, asking, "--kv-itemsize", "2") == "128"
    assert _kib_per_token(tmp_path, capsys, {**asking, "kv_cache_scheme": None}) == "128"


def test_what_asks_for_fp8_is_what_sglang_takes_for_it(tmp_path, capsys, rng: random.Random) -> None:
    seen = set()
    for _ in range(300):
        method = rng.choice(["compressed-tensors", "modelopt", "fp8"])
        scheme = {
            "type": rng.choice(["float", "float", "int"]),
            "num_bits": rng.choice([8, 8, 8, 4]),
            "strategy": rng.choice(["tensor", "tensor", "attn_head"]),
            "symmetric": rng.choice([True, True, False]),
            "dynamic": rng.choice([False, False, True]),
        }
        fields = {
            "kv_cache_scheme": rng.choice([None, scheme, scheme]),
            "kv_cache_quant_algo": rng.choice([None, "FP8", "fp8", "NVFP4"]),
        }
        given = {key: value for key, value in fields.items() if rng.random() < 0.8}
        asking = {"quant_method": method, "quant_algo": "FP8", "activation_scheme": "dynamic", **given}
        reader = get_quantization_config({"modelopt": "modelopt_fp8"}.get(method, method))
        taken = getattr(reader.from_config(copy.deepcopy(asking)), "kv_cache_quant_algo", None)
        is_fp8 = isinstance(taken, str) and taken.upper() == "FP8"
        assert _kib_per_token(tmp_path, capsys, asking) == ("64" if is_fp8 else "128"), asking
        seen.add((method, is_fp8))
    assert len(seen) == 6


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([], "--plan needs a model: add --model-path"),
        (["--model-path", "/no/such/folder"], "--model-path /no/such/folder has no usable configuration"),
        (["--model-path", "HERE", "--budget", "4"], "--budget 4 must be greater than --window 8"),
        (["--model-path", "HERE", "--buffer", "0"], "--buffer 0 is not an integer of at least 1: set --buffer 1 "),
        (["--model-path", "HERE", "--window", "-1"], "--window -1 is not an integer of at least 1: set --window 1 "),
        *[
            (
                ["--model-path", "HERE", flag, value],
                f"{flag} {value} is not an integer of at least 1: set {flag} 1 or more",
            )
            for flag in ("--tp-size", "--page-size", "--prompt-len", "--output-len", "--kv-itemsize")
            for value in ("0", "-600")
        ],
        *[
            (["--model-path", "HERE", "--kv-gib", "8", value], f"--kv-gib {value} is no amount of memory: ")
            for value in ("nan", "-1", "0", "inf", "1e+308")
        ],
        (
            ["--model-path", "HERE", "--tp-size", "3"],
            "--tp-size 3 does not share 32 query heads and 8 KV heads evenly: "
            "set --tp-size to one of 1, 2, 4, 8, 16, 32\n",
        ),
        (["--model-path", "HERE", "--tp-size", "64"], "--tp-size 64 does not share 32 query heads"),
    ],
)
def test_a_bad_plan_ends_in_one_line(tmp_path, capsys, arguments, problem):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    arguments = [str(tmp_path) if word == "HERE" else word for word in arguments]
    assert cli.main(["doctor", "--plan", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(problem) and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("tp_size, kib", [(1, 128), (4, 32), (8, 16), (32, 16)])
def test_the_kv_of_a_token_is_shared_among_ranks_down_to_one_head(tmp_path, capsys, tp_size, kib):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert cli.main(["doctor", "--plan", "--model-path", str(tmp_path), "--tp-size", str(tp_size)]) == 0
    assert capsys.readouterr().out.startswith(f"{kib} KiB of KV per token and rank")
