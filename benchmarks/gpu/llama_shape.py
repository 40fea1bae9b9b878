"""A model folder with the shape of Llama-3.1-8B and no weights, for ``--load-format dummy``.

Speed, memory and scheduling are those of the real model; answers are noise. Sizes as in the model's public config.json.
"""

import json
from pathlib import Path

from devtools.launch import importing_from

VOCAB_SIZE = 128256
# On a server's PYTHONPATH: the plugin that fills such a model.
WEIGHTS = Path(__file__).parent / "weights"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    # Newer transformers read the second, older ones the first.
    "rope_theta": 500000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# What a rehearsal changes, so that a CPU can serve it.
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def write_model(folder: Path, *, tiny: bool = False, num_layers: int | None = None) -> Path:
    """Write the config and a tokenizer of made-up words into ``folder`` and return it; what is there is kept."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    if (folder / "tokenizer_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | (TINY if tiny else {})
    config["num_hidden_layers"] = min(num_layers or config["num_hidden_layers"], config["num_hidden_layers"])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    # Last, so that its presence says that the folder is complete.
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )
    return folder


def served_model(
    model: str | None, work: Path, *, tiny: bool, num_layers: int | None = None
) -> tuple[str, list[str], dict[str, str]]:
    """Return what a server is given: a model, further flags, and variables of its environment.

    Args:
        model: Folder or hub name; None for this shape with made-up weights.
        work: Where the shape is written.
        tiny: Whether a CPU can serve it.
        num_layers: How many of its layers, if not all.
    """
    if model is not None:
        return model, [], {}
    name = "llama-3.1-8b-shape" if num_layers is None else f"llama-3.1-8b-shape-{num_layers}-layers"
    folder = write_model(work / name, tiny=tiny, num_layers=num_layers)
    return str(folder), ["--load-format", "dummy"], importing_from(WEIGHTS)
