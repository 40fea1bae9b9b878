"""Record the keys that a real model caches for a text, for ``benchmarks.kernels --recorded`` on a machine without it.

    python -m benchmarks.kernels.record_keys FILE --text TEXT [--num-tokens 1664] [--model FOLDER]

The text is read once, not repeated: copies would be near-duplicates that no answer has. A file of SmolLM2-135M has 11
kB a token.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.kernels.kit import RecordedKeys


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="file of the text")
    parser.add_argument("--num-tokens", type=int, default=1664, help="tokens read, default %(default)s")
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(options.model)(options.text.read_text(), return_tensors="pt")["input_ids"]
    if ids.shape[1] < options.num_tokens:
        parser.error(f"{options.text} has {ids.shape[1]} tokens, fewer than {options.num_tokens}")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        cache = model(ids[:, : options.num_tokens], use_cache=True, logits_to_keep=1).past_key_values
    keys = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers])
    options.file.parent.mkdir(parents=True, exist_ok=True)
    RecordedKeys(keys.half(), model.config.num_attention_heads).save(options.file)
    print(f"{options.file}: keys {list(keys.shape)}")


if __name__ == "__main__":
    main()
