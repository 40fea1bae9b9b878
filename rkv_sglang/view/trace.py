"""A recorded answer, prompt or document as a file: its tokens, and what every compaction of its KV cache kept."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from rkv_sglang.cache.trace import BoolArray, kept_positions
from rkv_sglang.messages import one_line, shown
from rkv_sglang.user_files import read_text, reason

FORMAT, VERSION = "rkv-sglang-trace", 1
# What may be recorded.
ANSWER, PROMPT, DOCUMENT = SUBJECTS = ("answer", "prompt", "document")
# Larger counts are no recording but damage, and would ask for more memory than there is.
MOST = 2**31
MOST_CELLS = 2**30
MOST_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One answer and what was evicted while it was generated; or a prompt or a document, and what stayed of it.

    Attributes:
        subject: Which of ``SUBJECTS`` the tokens are. What is said of generated tokens below is true of those of a
            prompt or a document: they were compacted once, ``prompt`` is empty and ``budget`` is what stayed of them.
        model: The model's path or name, as the server has it.
        policy: Name of the policy; ``budget``, ``buffer`` and ``window`` are its settings, in tokens. Every compaction
            keeps exactly ``budget`` per layer and KV head.
        tp_size: Ranks of tensor parallelism; with several, only the first rank's KV heads are recorded.
        prompt: The prompt's text; ``prompt_len`` is its length in tokens, all of them always kept.
        num_layers, num_kv_heads: The shape of what is recorded.
        tokens: Text of every generated token. Where a character takes several tokens it stands with the last of them
            and the others are empty.
        token_ids: Their ids.
        compactions: What ``rkv_sglang.cache.trace.pack_compaction`` returned, in order.

    Raises:
        ValueError: The fields do not fit together; one line.
    """

    model: str
    policy: str
    budget: int
    buffer: int
    window: int
    tp_size: int
    prompt: str
    prompt_len: int
    num_layers: int
    num_kv_heads: int
    tokens: list[str]
    token_ids: list[int]
    compactions: list[dict[str, Any]]
    subject: str = ANSWER

    def __post_init__(self) -> None:
        for name in ("model", "policy", "prompt"):
            _check_type(name, getattr(self, name), str)
        if self.subject not in SUBJECTS:
            raise ValueError(f"subject is {shown(self.subject)}, not one of {', '.join(SUBJECTS)}")
        for name in ("budget", "buffer", "window", "tp_size", "num_layers", "num_kv_heads"):
            _check_count(name, getattr(self, name), least=1)
        _check_count("prompt_len", self.prompt_len, least=0)
        for name, kind in (("tokens", str), ("token_ids", int), ("compactions", dict)):
            _check_type(name, getattr(self, name), list)
            for number, entry in enumerate(getattr(self, name)):
                _check_type(f"{name}[{number}]", entry, kind)
        if not self.tokens or len(self.tokens) != len(self.token_ids):
            raise ValueError(f"it has {len(self.tokens)} token texts and {len(self.token_ids)} token ids")
        if self.num_layers * self.num_kv_heads * len(self.tokens) > MOST_CELLS:
            raise ValueError("layers times KV heads times tokens are too many to show")
        for number, compaction in enumerate(self.compactions):
            _check_compaction(f"compactions[{number}]", compaction)
        self._check_kept()

    @cached_property
    def kept(self) -> list[BoolArray]:
        """After each compaction, which tokens every layer and KV head holds, ``[num_layers, num_kv_heads, tokens]``."""
        return kept_positions(self.compactions, self.num_layers, self.num_kv_heads, len(self.tokens))

    @property
    def totals(self) -> list[int]:
        """Tokens that had been in the cache by each compaction, evicted ones included."""
        return [int(entry["resident_len"]) + int(entry["evicted_before"]) for entry in self.compactions]

    def _check_kept(self) -> None:
        try:
            kept = self.kept
        except zlib.error as error:
            raise ValueError(f"the bits of a compaction cannot be unpacked ({error}): the trace is damaged") from error
        for number, mask in enumerate(kept, start=1):
            if (mask.sum(axis=2) != self.budget).any():
                raise ValueError(f"compaction {number} keeps another number than the budget: the trace is damaged")


def read_trace(path: str | Path) -> Trace:
    """Read what ``write_trace`` wrote.

    Raises:
        ValueError: The file cannot be read, is no trace, is one of another version, or is damaged; one line.
    """
    try:
        content = json.loads(read_text(path, most_bytes=MOST_BYTES))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)})") from error
    # Bad UTF-8 and bad JSON are ValueErrors; brackets nested without end run out of stack.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a trace: rkv-sglang view --save-trace writes one") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a trace: rkv-sglang view --save-trace writes one")
    version = content.pop("version", None)
    if version != VERSION:
        raise ValueError(
            f"{path} is a trace of version {shown(version)}, this program reads version {VERSION}: record anew"
        )
    names = {entry.name for entry in fields(Trace)}
    # Older ones are all of answers.
    content.setdefault("subject", ANSWER)
    if differing := sorted(names ^ content.keys()):
        raise ValueError(
            f"{path} lacks fields of a trace or has others ({one_line(', '.join(differing))}): it is damaged"
        )
    try:
        return Trace(**content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be shown: {error}") from error


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace as JSON, in ASCII."""
    content = {"format": FORMAT, "version": VERSION, **asdict(trace)}
    Path(path).write_text(json.dumps(content) + "\n", encoding="ascii")


def _check_type(name: str, value: Any, kind: type) -> None:
    # True is an int for Python, but no count or id.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is not of type {kind.__name__}")


def _check_count(name: str, value: Any, least: int) -> None:
    _check_type(name, value, int)
    if not least <= value <= MOST:
        raise ValueError(f"{name} is {value}, not a number from {least} to {MOST}")


def _check_compaction(name: str, compaction: Mapping[str, Any]) -> None:
    for key in ("resident_len", "evicted_before", "kept"):
        if key not in compaction:
            raise ValueError(f"{name} has no {key}")
    _check_count(f"{name}.resident_len", compaction["resident_len"], least=1)
    _check_count(f"{name}.evicted_before", compaction["evicted_before"], least=0)
    _check_type(f"{name}.kept", compaction["kept"], str)
