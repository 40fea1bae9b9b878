"""The rows of the serving benchmark against runs whose figures are worked out by hand."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.common.schema import Row
from benchmarks.common.tables import SERVING
from benchmarks.serving.rows import (
    NOTHING_COMPRESSED,
    Ratio,
    RequestRecord,
    compaction_steps,
    crossover,
    own_compaction_gaps,
    percentiles_ms,
    request_figures,
    require_equal_memory,
    throughput_ratios,
    token_gaps,
)
from benchmarks.serving.servers import running_requests
from rkv_sglang.config import PolicyConfig

# Compactions come before the passes of tokens 13, 15, 17, ... of an answer.
CONFIG = PolicyConfig(policy="rkv", budget=10, buffer=2, window=8)


def record(prompt_len: int, sent_s: float, times: list[float], **meta: Any) -> RequestRecord:
    """Return a request whose tokens came one by one."""
    chunks = tuple((time, i + 1) for i, time in enumerate(times))
    return RequestRecord(prompt_len, sent_s, chunks, {"num_retractions": 0, "cached_tokens": 0, **meta})


def test_a_run_worked_out_by_hand() -> None:
    # 16 tokens, the first after 0.5 s, then one each 0.1 s; tokens 13 and 15 are compacted for and come 0.3 s later.
    first_times = [1.5 + 0.1 * i + (0.3 if i >= 13 else 0) + (0.3 if i >= 15 else 0) for i in range(16)]
    first = record(30, 1.0, first_times, cached_tokens=10, queue_time=0.2, kv_compactions=2)
    # 3 tokens, never compacted, retracted once.
    second = record(10, 2.0, [2.1, 2.3, 2.5], queue_time=0.0, kv_compactions=0, num_retractions=1)
    failed = RequestRecord(10, 0.5, (), {}, "status 503")
    row = request_figures([first, second, failed], CONFIG)
    assert row["answered"] == 2 and row["failed"] == 1
    # From 0.5 s, when the failed one was sent, to the first request's last token at 1.5 + 1.5 + 0.6.
    assert row["seconds"] == pytest.approx(3.1)
    assert row["tokens_per_s"] == pytest.approx(19 / 3.1, abs=0.01)
    assert row["requests_per_s"] == pytest.approx(2 / 3.1, abs=1e-3)
    # TTFT 500 and 100 ms.
    assert row["ttft_p50"] == pytest.approx(300) and row["ttft_p99"] == pytest.approx(496)
    # Gaps: 13 of 100 ms, 2 of 200 ms, 2 of 400 ms.
    assert row["itl_p50"] == pytest.approx(100) and row["itl_p99"] == pytest.approx(400)
    assert row["itl_compaction_p50"] == pytest.approx(400) and row["compaction_gaps"] == 2
    assert row["queue_p50"] == pytest.approx(100) and row["queue_p99"] == pytest.approx(198)
    assert row["retractions"] == 1 and row["prefix_hit_rate"] == 0.25
    assert row["compactions"] == 2 and row["compressed_share"] == 0.5 and row["note"] == ""
    assert (row["output_len_mean"], row["output_len_min"], row["output_len_max"]) == (9.5, 3, 16)
    assert row["single_token_chunks"] == 1


def test_a_run_in_which_nothing_was_compressed_says_so() -> None:
    short = [record(4, 0.0, [0.1 * i for i in range(1, 9)], kv_compactions=0) for _ in range(3)]
    row = request_figures(short, CONFIG)
    assert row["note"] == NOTHING_COMPRESSED and row["compactions"] == 0 and row["compressed_share"] == 0
    assert row["compaction_gaps"] == 0 and math.isnan(float(row["itl_compaction_p99"]))
    # Without a policy nothing could have been compressed: there is nothing to warn of.
    assert request_figures(short, None)["note"] == ""


def test_tokens_of_one_chunk_share_its_time() -> None:
    chunked = RequestRecord(5, 0.0, ((1.0, 2), (1.6, 5), (1.7, 6)), {})
    gaps = token_gaps(chunked)
    # Tokens 0 and 1 came with the first chunk, which is TTFT.
    assert sorted(gaps) == [2, 3, 4, 5]
    assert [gaps[step] for step in (2, 3, 4, 5)] == pytest.approx([0.2, 0.2, 0.2, 0.1])
    assert request_figures([chunked], None)["single_token_chunks"] == 0.25


def test_gaps_add_up_to_the_time_from_first_to_last_token(rng: random.Random) -> None:
    times, totals, now, total = [], [], rng.random(), 0
    for _ in range(rng.randint(1, 40)):
        now += rng.random()
        total += rng.randint(1, 4)
        times.append(now)
        totals.append(total)
    gaps = token_gaps(RequestRecord(5, 0.0, tuple(zip(times, totals, strict=True)), {}))
    assert sum(gaps.values()) == pytest.approx(times[-1] - times[0])
    assert sorted(gaps) == list(range(totals[0], totals[-1]))


def test_compaction_steps_are_those_of_a_literal_simulation(rng: random.Random) -> None:
    budget, buffer = rng.randint(9, 30), rng.randint(1, 20)
    config = PolicyConfig(policy="rkv", budget=budget, buffer=buffer)
    output_len = rng.randint(1, 200)
    steps, resident = [], 0
    for step in range(1, output_len):
        # The pass of this token finds what the passes before it wrote, and adds the KV of the token before.
        if resident == budget + buffer:
            resident = budget
            steps.append(step)
        resident += 1
    assert compaction_steps(config, output_len) == steps


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_gap_of_a_compaction_is_found_where_the_scheduler_puts_it(ahead: int) -> None:
    slow = {step - ahead for step in compaction_steps(CONFIG, 40)}
    times = [0.0]
    for step in range(1, 40):
        times.append(times[-1] + (0.5 if step in slow else 0.1))
    gaps = own_compaction_gaps([record(5, 0.0, times, kv_compactions=len(slow))], CONFIG)
    assert gaps == pytest.approx([0.5] * len(slow)) and len(slow) == 14


def test_gaps_of_requests_whose_steps_are_not_known_are_left_out() -> None:
    times = [0.1 * i for i in range(40)]
    for meta in ({"kv_compactions": 13}, {"kv_compactions": 14, "num_retractions": 1}, {}):
        assert own_compaction_gaps([record(5, 0.0, times, **meta)], CONFIG) == []
    assert own_compaction_gaps([record(5, 0.0, times, kv_compactions=14)], None) == []
    staggered = replace(CONFIG, stagger=True)
    assert own_compaction_gaps([record(5, 0.0, times, kv_compactions=14)], staggered) == []


def test_a_run_without_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="status 503"):
        request_figures([RequestRecord(10, 0.5, (), {}, "status 503")], None)
    with pytest.raises(ValueError, match="none was sent"):
        request_figures([], None)


def test_percentiles() -> None:
    p50, p99 = percentiles_ms([0.001 * i for i in range(101)])
    assert (p50, p99) == (pytest.approx(50), pytest.approx(99))


def run_row(setting: str, pool: float, round_index: int, tokens_per_s: float, **more: Any) -> Row:
    policy = "none" if setting == "none" else "rkv"
    return {
        "arrivals": "lockstep",
        "pool": pool,
        "round": round_index,
        "setting": setting,
        "policy": policy,
        "tokens_per_s": tokens_per_s,
        "note": "",
        **more,
    }


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is twice as fast in round 1: a ratio over rounds would say anything.
    rows = [
        *(run_row("none", 10, i, speed) for i, speed in enumerate((100, 200, 100))),
        *(run_row("rkv", 10, i, speed) for i, speed in enumerate((150, 240, 140))),
        run_row("none", 99, 0, 100),
        run_row("none", 99, 1, 100),
        run_row("rkv", 99, 0, 90),
        run_row("rkv", 99, 1, 120),
        run_row("rkv", 77, 0, 90),
    ]
    ratios = throughput_ratios(rows, "none")
    assert set(ratios) == {("lockstep", "rkv", 10.0), ("lockstep", "rkv", 99.0)}
    small, large = ratios["lockstep", "rkv", 10.0], ratios["lockstep", "rkv", 99.0]
    assert (small.median, small.low, small.high) == pytest.approx((1.4, 1.2, 1.5)) and small.verdict == "more"
    assert small.by_round == pytest.approx((1.5, 1.2, 1.4)) and large.verdict == "rounds disagree"
    slower = [
        run_row("none", 1, 0, 100),
        run_row("rkv", 1, 0, 90),
        run_row("none", 1, 1, 100),
        run_row("rkv", 1, 1, 80),
    ]
    assert throughput_ratios(slower, "none")["lockstep", "rkv", 1.0].verdict == "less"
    assert "no verdict" in throughput_ratios(slower[:2], "none")["lockstep", "rkv", 1.0].verdict


def test_a_round_without_compression_takes_the_verdict_away() -> None:
    rows = [
        *(run_row("none", 10, i, 100) for i in range(2)),
        run_row("rkv", 10, 0, 150),
        run_row("rkv", 10, 1, 150, note=NOTHING_COMPRESSED),
    ]
    ratio = throughput_ratios(rows, "none")["lockstep", "rkv", 10.0]
    assert ratio.uncompressed == 1 and ratio.verdict == NOTHING_COMPRESSED


def test_the_crossover_lies_where_the_medians_fall_to_one() -> None:
    def by_pool(*medians: float) -> dict[float, Ratio]:
        return {10.0 * 2**i: Ratio(median, median, median, (median,), 0) for i, median in enumerate(medians)}

    assert crossover(by_pool(2, 1.1, 1, 0.9)) == "more up to pool 20 and not from 40 on: the crossover lies between"
    assert crossover(by_pool(0.9, 1)) == "more at no pool"
    assert "above 20" in crossover(by_pool(2, 1.01))
    assert "pools 10, 40 and no others" in crossover(by_pool(2, 0.9, 1.1))
    idle = Ratio(2, 2, 2, (2,), 1)
    assert crossover({10: idle}) == NOTHING_COMPRESSED
    assert crossover({**by_pool(0.9, 0.8), 5: idle}) == "more at no pool"


def test_more_memory_for_a_policy_is_refused() -> None:
    rows = [run_row("none", 10, 0, 1, memory_bytes=1000), run_row("rkv", 10, 0, 1, memory_bytes=1000)]
    require_equal_memory(rows)
    rows[1]["memory_bytes"] = 1001
    with pytest.raises(ValueError, match="rkv had 1001 bytes"):
        require_equal_memory(rows)
    # A share of the GPU's memory is divided by SGLang.
    require_equal_memory([{**row, "pool": 0.8} for row in rows])


def test_running_requests_come_from_the_decode_lines() -> None:
    log = (
        "[now] Prefill batch, #new-seq: 3, #running-req: 9, #queue-req: 0\n"
        "[now] Decode batch, #running-req: 4, #token: 100, token usage: 0.10, #resident/logical: 1/2, #queue-req: 7\n"
        "[now] Decode batch [12], #running-req: 7, #token: 100\n"
    )
    assert running_requests(log) == (7, 5.5)
    assert running_requests("")[0] == 0 and math.isnan(running_requests("")[1])


def test_the_figures_are_columns_of_the_table() -> None:
    names = {column.name for column in SERVING.columns}
    assert set(request_figures([record(4, 0.0, [0.1, 0.2])], None)) <= names
