"""A server's own tokenizer: texts into tokens, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rkv_sglang.client.server import answered

TIMEOUT_S = 120


class Tokenizer:
    """The tokenizer of one server.

    Args:
        server: Its address, ``http://host:port``.
        info: Its ``/server_info``.

    Raises:
        ValueError: It has none; one line. So do all methods where the server refuses or does not answer.
    """

    def __init__(self, server: str, api_key: str | None, info: Mapping[str, Any]) -> None:
        if info.get("skip_tokenizer_init"):
            raise ValueError(f"{server} has no tokenizer: start it without --skip-tokenizer-init")
        self._server, self._api_key = server, api_key

    def ids(self, text: str, *, special: bool = False) -> Sequence[int]:
        """Return a text's tokens; with the special ones in front of it, not with those behind."""
        plain = self._ids(text, special=False)
        return with_front(plain, self._ids(text, special=True)) if special else plain

    def pieces(self, ids: Sequence[int]) -> tuple[list[str], str]:
        """Return every token's text, decoded alone, and the text of all together, special tokens among them."""
        payload = {"tokens": [[token] for token in ids] + [list(ids)], "skip_special_tokens": False}
        texts = self._answered("/detokenize", payload, "text", str)
        if len(texts) != len(ids) + 1:
            raise ValueError(f"{self._server} answers unlike SGLang: its /detokenize gives {len(texts)} texts")
        return texts[:-1], texts[-1]

    def _ids(self, text: str, *, special: bool) -> Sequence[int]:
        payload = {"prompt": text, "add_special_tokens": special}
        return self._answered("/tokenize", payload, "tokens", int)

    def _answered(self, path: str, payload: dict[str, Any], key: str, kind: type) -> list[Any]:
        answer = answered(self._server, path, payload, TIMEOUT_S, self._api_key)
        found = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(found, list) or not all(isinstance(part, kind) for part in found):
            raise ValueError(f"{self._server} answers unlike SGLang: its {path} gives no {key}")
        return found


def with_front(plain: Sequence[int], special: Sequence[int]) -> Sequence[int]:
    """Return a text's tokens with those special ones in front of it that its tokenizer puts there.

    Args:
        plain: The text alone.
        special: The text with special tokens, before it or behind.
    """
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return special[: start + len(plain)]
    return special
