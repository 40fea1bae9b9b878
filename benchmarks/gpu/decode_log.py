"""What a server's decode log lines say of its steps. Needs ``--decode-log-interval 1``."""

import itertools
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.common.schema import Row

_LINE = re.compile(
    r"Decode batch.*?#running-req: (?P<running>\d+),.*?(?P<backend>\w+) graph: (?P<graph>True|False),"
    r" gen throughput \(token/s\): (?P<speed>[\d.]+)"
)
_RESIDENT = re.compile(r"#resident/logical: (\d+)/(\d+)")


@dataclass(frozen=True)
class Step:
    """One decode step as SGLang logged it.

    Attributes:
        running: Requests in the batch.
        graph: Whether a captured graph was replayed.
        time_ms: From the line before to this one.
        evicted: Tokens that the batch has evicted so far; 0 without a policy.
        compacted: Whether that grew with this step. Under overlap scheduling the line of the step before may show it.
    """

    running: int
    graph: bool
    time_ms: float
    evicted: int
    compacted: bool


def read_steps(log: str) -> list[Step]:
    """Return the decode steps of a log, in order. Lines whose time is unknown (speed 0) are left out."""
    steps: list[Step] = []
    evicted_before = 0
    for line in log.splitlines():
        found = _LINE.search(line)
        if not found:
            continue
        tokens = _RESIDENT.search(line)
        evicted = int(tokens[2]) - int(tokens[1]) if tokens else 0
        running, speed = int(found["running"]), float(found["speed"])
        if speed > 0 and running > 0:
            steps.append(
                Step(running, found["graph"] == "True", 1e3 * running / speed, evicted, evicted > evicted_before)
            )
        evicted_before = evicted
    return steps


def steady(steps: Sequence[Step], batch_size: int) -> Iterator[Step]:
    """Yield the steps of full batches whose predecessor was full too: no prefill lies between."""
    for before, step in itertools.pairwise(steps):
        if before.running == step.running == batch_size:
            yield step


def figures_of(steps: Sequence[Step], batch_size: int) -> Row:
    """Return the figures of ``serve_check`` of the steps of full batches; NaN where there is no such step."""
    full = list(steady(steps, batch_size))
    # Where forward passes overlap with scheduling, the line after the one that tells of a compaction has waited for it.
    due = [number for number, step in enumerate(full[:-1]) if step.compacted]
    compacting = [max(full[number].time_ms, full[number + 1].time_ms) for number in due]
    # Steps grow with what is held, so a compaction's is judged by those around it.
    around = [step.time_ms for number in due for step in [*full[max(number - 3, 0) : number], *full[number + 2 :][:3]]]
    row: Row = {"steps": len(full), "graph_steps": sum(step.graph for step in full)}
    for name, times in (("step", [step.time_ms for step in full]), ("compacting", compacting)):
        for quantile in (50, 99):
            row[f"{name}_p{quantile}_ms"] = _percentile(times, quantile)
    row["around_p50_ms"] = _percentile(around, 50)
    row["compacting_steps"] = len(compacting)
    row["step_mean_ms"] = round(statistics.fmean(step.time_ms for step in full), 4) if full else float("nan")
    return row


def _percentile(times: Sequence[float], quantile: int) -> float:
    return round(float(np.percentile(times, quantile)), 4) if times else float("nan")
