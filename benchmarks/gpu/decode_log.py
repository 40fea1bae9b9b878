"""What a server's decode log lines say of its steps. Needs ``--decode-log-interval 1``."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
