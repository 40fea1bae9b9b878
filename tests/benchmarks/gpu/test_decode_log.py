"""Decode log lines of SGLang 0.5.23 as they are printed, with figures known by hand."""

import math

import pytest

from benchmarks.gpu.decode_log import figures_of, read_steps, steady

HEAD = "[2026-01-01 00:00:00] Decode batch, #running-req: {running}, #token: 20, token usage: 0.00, "
TAIL = "{backend} graph: {graph}, gen throughput (token/s): {speed}, #queue-req: 0"


def line(running: int, speed: float, *, tokens: str = "", graph: bool = True, backend: str = "cuda") -> str:
    middle = f"#resident/logical: {tokens}, " if tokens else ""
    return HEAD.format(running=running) + middle + TAIL.format(backend=backend, graph=graph, speed=speed)


def test_times_graphs_and_compactions_are_read() -> None:
    log = "\n".join(
        [
            "[2026-01-01 00:00:00] Prefill batch, #new-seq: 2",
            line(2, 0.0),
            line(2, 100.0, tokens="96/96"),
            line(2, 50.0, tokens="66/98", graph=False),
            line(2, 200.0, tokens="68/100", backend="cpu"),
            line(1, 125.0, tokens="34/50"),
        ]
    )
    steps = read_steps(log)
    assert [step.time_ms for step in steps] == pytest.approx([20.0, 40.0, 10.0, 8.0])
    assert [step.graph for step in steps] == [True, False, True, True]
    # A request that ends takes its evicted tokens with it; that is no compaction.
    assert [step.compacted for step in steps] == [False, True, False, False]
    assert [step.evicted for step in steps] == [0, 32, 32, 16]


def test_only_steps_between_full_batches_count() -> None:
    steps = read_steps("\n".join(line(running, 10.0 * running) for running in (1, 2, 2, 2, 1, 2, 2)))
    assert len(list(steady(steps, 2))) == 3


def test_a_compacting_step_is_told_apart_from_those_around_it() -> None:
    times = [10, 10, 11, 12, 13, 40, 60, 14, 15, 16, 50]
    tokens = ["9/9"] * 5 + ["5/9"] * 6
    log = "\n".join(line(1, 1e3 / time, tokens=held) for time, held in zip(times, tokens, strict=True))
    row = figures_of(read_steps(log), 1)
    # The later of both is what had to wait; neither is among those around.
    assert (row["compacting_steps"], row["compacting_p50_ms"]) == (1, pytest.approx(60, abs=0.1))
    assert row["around_p50_ms"] == pytest.approx(13.5, abs=0.1)
    assert math.isnan(figures_of(read_steps(line(1, 10.0)), 1)["around_p50_ms"])


def test_a_log_without_decode_lines_has_no_steps() -> None:
    assert read_steps("nothing\nto see, graph: True") == []
