"""One self-contained HTML page that shows one trace, or two side by side."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from rkv_sglang.view.trace import Trace

_SCRIPTS = ("page_data.js", "page_pane.js", "page_state.js")
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
_PLACE = re.compile(r"@@([A-Z]+)@@")


def page_html(traces: Sequence[Trace]) -> str:
    """Return the page. It loads nothing: its scripts and styles are allowed by their hashes, all else is forbidden."""
    parts = {"CSS": _packaged("page.css"), "JS": "\n".join(_packaged(name) for name in _SCRIPTS)}
    shell = _PLACE.sub(lambda place: parts.get(place[1], place[0]), _packaged("page.html"))
    last = {"POLICY": _security_policy(shell), "DATA": _embedded([trace_data(trace) for trace in traces])}
    # In one pass, so that what a token spells is never taken for a place.
    return _PLACE.sub(lambda place: last[place[1]], shell)


def trace_data(trace: Trace) -> dict[str, Any]:
    """Return what the page needs to know of a trace, as JSON can hold it.

    Returns:
        The trace's own fields but for the compactions; ``totals``, one entry a compaction; and ``epochs``. An epoch is
        a run of compactions in which the cache was never computed again (one epoch, unless the request was preempted):
        its ``first`` and ``last`` compaction, from 1; ``width`` in tokens; and ``lives``, for every token and, within
        it, every layer and KV head the compaction that evicted it, 0 if none of the epoch did: unsigned little-endian
        integers of ``bytes`` each, compressed with zlib, then base64.
    """
    names = ("subject", "model", "policy", "budget", "buffer", "window", "tp_size", "prompt", "prompt_len")
    return {
        **{name: getattr(trace, name) for name in names},
        "layers": trace.num_layers,
        "heads": trace.num_kv_heads,
        "tokens": trace.tokens,
        "ids": trace.token_ids,
        "totals": trace.totals,
        "epochs": _epochs(trace),
    }


def _epochs(trace: Trace) -> list[dict[str, Any]]:
    starts = [number for number, entry in enumerate(trace.compactions) if int(entry["evicted_before"]) == 0]
    ends = [*starts[1:], len(trace.compactions)]
    return [_epoch(trace, start, end) for start, end in zip(starts, ends, strict=False)]


def _epoch(trace: Trace, start: int, end: int) -> dict[str, Any]:
    totals = trace.totals
    width = totals[end - 1]
    dtype = np.dtype("u1" if len(totals) < 2**8 else "<u2" if len(totals) < 2**16 else "<u4")
    lives = np.zeros((trace.num_layers, trace.num_kv_heads, width), dtype=dtype)
    for number in range(start, end):
        missing = ~trace.kept[number][:, :, :width]
        missing[:, :, totals[number] :] = False
        lives[missing & (lives == 0)] = number + 1
    by_token = np.ascontiguousarray(lives.reshape(-1, width).T)
    return {
        "first": start + 1,
        "last": end,
        "width": width,
        "bytes": dtype.itemsize,
        "lives": base64.b64encode(zlib.compress(by_token.tobytes())).decode("ascii"),
    }


def _embedded(data: Any) -> str:
    """Return JSON that can stand in a script element: no token can end the element or open a comment in it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _security_policy(html: str) -> str:
    scripts, styles = (
        " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)
        for found in (_SCRIPT.findall(html), _STYLE.findall(html))
    )
    return f"default-src 'none'; script-src {scripts}; style-src {styles}; base-uri 'none'; form-action 'none'"


def _packaged(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
