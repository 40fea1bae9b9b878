"""The tiny models are lively, the same wherever they are made, and safe to make from several processes."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from devtools import tiny_models
from devtools.tiny_models import TINY_MODELS, VOCAB_SIZE, small_model_path, tiny_model_path, tiny_tokenizer
from tests.support.oracle.dense import dense_generate


@pytest.mark.parametrize("name", TINY_MODELS)
def test_greedy_output_is_lively(name: str) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of this run: {seed}")
    rng = random.Random(seed)
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(20)]
    outputs = dense_generate(tiny_model_path(name), prompt, 160, budget=10**9, buffer=1).output_ids
    assert len(set(outputs)) > 60
    tail = outputs[-80:]
    assert not any(tail[period:] == tail[:-period] for period in range(1, 41)), "the output ends in a loop"


def test_the_same_files_wherever_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for number in range(2):
        monkeypatch.setattr(tiny_models, "MODELS_DIR", tmp_path / str(number))
        torch.manual_seed(number)
        before = torch.get_rng_state()
        folders.append(tiny_model_path.__wrapped__("qwen3"))
        assert torch.equal(torch.get_rng_state(), before)
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert folders[0].name == folders[1].name
    assert first == second
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= first.keys()


def test_whoever_is_second_takes_the_folder_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model = tiny_models._write_model

    def overtaken(*arguments: object) -> None:
        monkeypatch.setattr(tiny_models, "_write_model", write_model)
        tiny_model_path.__wrapped__("llama-gqa")
        write_model(*arguments)

    monkeypatch.setattr(tiny_models, "MODELS_DIR", tmp_path)
    monkeypatch.setattr(tiny_models, "_write_model", overtaken)
    folder = tiny_model_path.__wrapped__("llama-gqa")
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]
    assert tiny_model_path.__wrapped__("llama-gqa") == folder


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tiny_models, "MODELS_DIR", tmp_path)
    monkeypatch.setattr(tiny_models, "_write_model", full_disk)
    with pytest.raises(OSError, match="no space left"):
        tiny_model_path.__wrapped__("llama-gqa")
    assert list(tmp_path.iterdir()) == []


def test_every_token_is_text_and_text_round_trips() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path("llama-gqa"))
    assert len(tokenizer) == VOCAB_SIZE
    pieces = [tokenizer.decode([token_id]) for token_id in range(3, VOCAB_SIZE)]
    assert all(piece.isascii() and piece for piece in pieces)
    assert len(set(pieces)) == len(pieces)
    text = 'Some text, 3 lines:\n{"key": [1, -2.5]}\n end'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tiny_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_missing_real_model_names_its_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "MODELS_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match="make setup"):
        small_model_path()
