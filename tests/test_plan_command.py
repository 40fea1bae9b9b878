"""The plan's table is arithmetic on a model's configuration."""

import json
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([], "--plan needs a model: add --model-path"),
        (["--model-path", "/no/such/folder"], "--model-path /no/such/folder has no usable configuration"),
        (["--model-path", "HERE", "--budget", "4"], "--kv-budget 4 must be greater than --kv-window 8"),
    ],
)
def test_a_bad_plan_ends_in_one_line(tmp_path, capsys, arguments, problem):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    arguments = [str(tmp_path) if word == "HERE" else word for word in arguments]
    assert cli.main(["doctor", "--plan", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(problem) and captured.err.count("\n") == 1
    assert captured.out == ""
