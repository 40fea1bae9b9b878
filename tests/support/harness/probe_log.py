"""What the probe wrote during a run, and what the log of the run must not contain."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# "leak" as SGLang's checkers write it; a flag such as --enable-memory-leak-... in the printed arguments is none.
_BAD_LOG = re.compile(
    r"Traceback \(most recent call last\)|Scheduler hit an exception|\bleak(?:s|ed)?\b"
    r"|Failed to (?:load|execute) .*plugin|Failed to apply hooks",
    re.IGNORECASE,
)


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class ProbeLog:
    """The probe's lines of one run, in order.

    Attributes:
        events: All lines of rank 0, parsed.
        steps: One line per scheduled batch: lengths and slots of every request that holds KV, pool sizes.
        compactions: One line per request and compaction.
        idles: One line per time the scheduler fell idle.
        violations: What must never happen, on any rank; see ``tests/support/probe/rkv_probe.py``.
        other_ranks: The logs of the other tensor-parallel ranks.
    """

    def __init__(self, events: list[dict[str, Any]], other_ranks: "Sequence[ProbeLog]" = ()) -> None:
        self.events = events
        self.other_ranks = list(other_ranks)
        self.violations = [event for event in events if "violation" in event]
        self.violations += [violation for rank in other_ranks for violation in rank.violations]
        self.steps = self._of_kind("step")
        self.compactions = self._of_kind("compaction")
        self.idles = self._of_kind("idle")

    def _of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("event") == kind]

    @classmethod
    def read(cls, path: Path) -> "ProbeLog":
        """Read the file of rank 0 and those of the other ranks beside it. A last line cut short is left out."""
        others = [cls(_lines(part)) for part in sorted(path.parent.glob(path.name + ".rank*"))]
        return cls(_lines(path), others)

    @property
    def total(self) -> int:
        """Slots of the pool."""
        return int(self._of_kind("start")[0]["total"])

    @property
    def retractions(self) -> int:
        return max((int(event.get("retractions", 0)) for event in [*self.steps, *self.idles]), default=0)

    @property
    def peak_running(self) -> int:
        """Most requests in one decode batch."""
        return max((len(step["batch"]) for step in self.steps if step["mode"] == "DECODE"), default=0)

    def per_request(self, rid: str) -> list[dict[str, Any]]:
        """Return what the steps say of one request, each with its ``step`` number."""
        return [
            {**entry, "step": step["step"], "mode": step["mode"]}
            for step in self.steps
            for entry in step["running"]
            if entry["rid"] == rid
        ]

    def assert_clean(self, log: str = "") -> None:
        """Assert that the probe watched, saw no violation, ended idle with a whole pool, and that the log is clean."""
        self._assert_clean_rank()
        for rank in self.other_ranks:
            rank._assert_clean_rank()
        # What Python's resource tracker tidies up when a tensor-parallel scheduler exits is no leak of KV.
        lines = [line for line in log.splitlines() if "server_args" not in line and "resource_tracker" not in line]
        bad = [line for line in lines if _BAD_LOG.search(line)]
        assert not bad, "the log has:\n" + "\n".join(bad[:10])

    def _assert_clean_rank(self) -> None:
        assert self._of_kind("start"), (
            "the probe never started: is tests/support/probe on PYTHONPATH and RKV_PROBE_FILE set?"
        )
        assert not self.violations, "the probe saw:\n" + "\n".join(json.dumps(line) for line in self.violations[:10])
        assert self.steps, "the probe saw no step"
        assert self.idles, "the scheduler never fell idle after its last request"
        last = self.idles[-1]
        assert last["step"] >= self.steps[-1]["step"], "the scheduler was not idle at the end"
        assert last["ok"], f"the pool is not as at start: {last}"
