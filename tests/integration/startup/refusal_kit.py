"""What the tests of refusals share: tiny model configs without weights, and the one line of an error."""

from pathlib import Path
from typing import Any

import pytest

from rkv_sglang.integration.startup.errors import RefusedError

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config_dir(folder: Path, config: Any, architecture: str) -> str:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return str(folder)


def message_of(check: Any, *args: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        check(*args)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    return message
