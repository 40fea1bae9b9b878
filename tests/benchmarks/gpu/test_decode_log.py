"""Decode log lines of SGLang 0.5.23 as they are printed, with figures known by hand."""

import pytest

from benchmarks.gpu.decode_log import read_steps, steady

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


def test_a_log_without_decode_lines_has_no_steps() -> None:
    assert read_steps("nothing\nto see, graph: True") == []
