"""A folder that stands for a model's own, with nothing in it but its configuration."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rkv_sglang.user_files import read_text, reason

# Mistral's own format, which SGLang reads of models with certain names.
_MISTRAL_FILE = "params.json"


@contextlib.contextmanager
def folder_of(model_config: str, options: argparse.Namespace) -> Iterator[str]:
    """Make a folder that looks like a model's, for the while.

    It is named as the model is, because SGLang looks for words in that. Code that comes with a model to read its
    configuration is not there, so with ``--trust-remote-code`` the configuration is taken as it is written.

    Raises:
        ValueError: The file holds no JSON object; one line.
    """
    try:
        fields = json.loads(read_text(os.path.expanduser(model_config)))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--model-config {model_config} cannot be read ({reason(error)}): name a model's config.json"
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(f"--model-config {model_config} holds no JSON object: name a model's config.json")
    file = _MISTRAL_FILE if Path(model_config).name == _MISTRAL_FILE else "config.json"
    with tempfile.TemporaryDirectory() as root, _read_as_written(fields, bool(options.trust_remote_code)) as written:
        folder = Path(root) / _folder_name(options.model_path)
        folder.mkdir()
        (folder / file).write_text(json.dumps(written), encoding="utf-8")
        yield str(folder)


def _folder_name(model_path: str) -> str:
    return re.sub(r"[^\w.-]", "_", os.path.basename(model_path.rstrip("/")), flags=re.ASCII)[:100].strip(".") or "model"


@contextlib.contextmanager
def _read_as_written(fields: dict[str, Any], is_code_trusted: bool) -> Iterator[dict[str, Any]]:
    """Have transformers take a configuration as it is, where code that is not here would read it.

    Yields the configuration without what names that code.
    """
    # As it is imported, SGLang gives transformers classes of its own.
    import sglang.srt.utils.hf_transformers_utils  # noqa: F401
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    named: Any = fields.get("auto_map")
    kind = fields.get("model_type")
    is_named = isinstance(named, dict) and "AutoConfig" in named
    if not is_code_trusted or not is_named or not isinstance(kind, str) or _is_registered(CONFIG_MAPPING, kind):
        yield fields
        return

    class AsWritten(PretrainedConfig):  # type: ignore[misc]
        model_type = kind

        def __init__(self, layer_types: list[str] | None = None, **others: Any) -> None:
            super().__init__(**others)
            # Those of layers beyond the model's count may be among them, which transformers would refuse.
            if layer_types is not None:
                self.layer_types = layer_types

    registered = CONFIG_MAPPING._extra_content
    before = registered.get(kind)
    registered[kind] = AsWritten
    try:
        yield {**fields, "auto_map": {name: code for name, code in named.items() if name != "AutoConfig"}}
    finally:
        del registered[kind]
        if before is not None:
            registered[kind] = before


def _is_registered(mapping: Mapping[str, type], kind: str) -> bool:
    """Return whether SGLang has brought a class for this kind of model, which transformers then prefers."""
    return kind in mapping and not mapping[kind].__module__.startswith("transformers.")
