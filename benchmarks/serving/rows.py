"""From what the client recorded to one row of ``serving.csv``: plain arithmetic, no server.

TTFT, inter-token latency and throughput are defined as in SGLang's own client: TTFT from sending a request to its first
chunk; a chunk of n tokens that comes t after the one before counts as n gaps of t / n; throughput is generated tokens
over the time from the first request to the last answer.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common.schema import Row
from benchmarks.common.statistics import compactions_before
from rkv_sglang.config import NO_POLICY, PolicyConfig

NOTHING_COMPRESSED = "nothing was compressed: this row says nothing about the policy"
NAN = float("nan")


@dataclass(frozen=True)
class RequestRecord:
    """What the client saw of one request; times in seconds since the replay began.

    Attributes:
        prompt_len: Tokens of the prompt.
        sent_s: When it was sent.
        chunks: Arrival of every chunk of the answer, and the tokens generated up to it.
        meta_info: Of the last chunk.
        error: Why it failed; None if it was answered.
    """

    prompt_len: int
    sent_s: float
    chunks: tuple[tuple[float, int], ...]
    meta_info: Mapping[str, Any]
    error: str | None = None

    @property
    def output_len(self) -> int:
        """Tokens generated."""
        return self.chunks[-1][1] if self.chunks else 0

    @property
    def num_compactions(self) -> int:
        """Compactions that the server counted; 0 where no policy is."""
        return int(self.meta_info.get("kv_compactions", 0))


def token_gaps(record: RequestRecord) -> dict[int, float]:
    """Return by step (token of the answer, from 0) the seconds since the token before; none for the first chunk's."""
    gaps = {}
    for (before_s, seen), (now_s, total) in zip(record.chunks, record.chunks[1:], strict=False):
        for step in range(seen, total):
            gaps[step] = (now_s - before_s) / (total - seen)
    return gaps


def compaction_steps(config: PolicyConfig, output_len: int) -> list[int]:
    """Return the steps whose forward pass comes right after a compaction, for a request that is not retracted."""
    counts = [compactions_before(step, config.budget, config.buffer) for step in range(output_len)]
    return [step for step in range(1, output_len) if counts[step] > counts[step - 1]]


def own_compaction_gaps(records: Iterable[RequestRecord], config: PolicyConfig | None) -> list[float]:
    """Return the gaps between tokens that a compaction of the same request lies in.

    With the overlap scheduler the pass of a token is queued before the token ahead of it is sent: what queueing a
    compaction takes delays that one, what the device takes delays its own token. So the gaps before both are looked at,
    and those with the larger median are returned. Without requests that were retracted or whose compactions are not
    those that the server counted: their steps are not known. Nor are those of any request where they are staggered.
    """
    candidates: tuple[list[float], list[float]] = ([], [])
    for record in records:
        if config is None or config.stagger or record.meta_info.get("num_retractions", 0):
            continue
        steps = compaction_steps(config, record.output_len)
        if len(steps) != record.num_compactions:
            continue
        gaps = token_gaps(record)
        for ahead, found in enumerate(candidates):
            found += [gaps[step - ahead] for step in steps if step - ahead in gaps]
    return max(candidates, key=lambda found: statistics.median(found) if found else 0.0)


def percentiles_ms(seconds: Sequence[float]) -> tuple[float, float]:
    """Return p50 and p99 in milliseconds (linear between ranks); NaN of nothing."""
    if not seconds:
        return NAN, NAN
    p50, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 99])
    return float(p50), float(p99)


def request_figures(records: Sequence[RequestRecord], config: PolicyConfig | None) -> Row:
    """Return the columns of a row that follow from the requests.

    Args:
        records: Of all requests of one run.
        config: The server's policy; None for a server without one.

    Raises:
        ValueError: No request was answered; the message has the first error.
    """
    answered = [record for record in records if record.error is None]
    if not answered:
        raise ValueError(f"no request was answered: {records[0].error if records else 'none was sent'}")
    seconds = max(record.chunks[-1][0] for record in answered) - min(record.sent_s for record in records)
    gaps = [gap for record in answered for gap in token_gaps(record).values()]
    own = own_compaction_gaps(answered, config)
    alone = sum(
        after - before == 1 for r in answered for (_, before), (_, after) in zip(r.chunks, r.chunks[1:], strict=False)
    )
    lengths = [record.output_len for record in answered]
    compactions = sum(record.num_compactions for record in answered)
    columns: Row = {
        "answered": len(answered),
        "failed": len(records) - len(answered),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(sum(lengths) / seconds, 2),
        "requests_per_s": round(len(answered) / seconds, 4),
        "retractions": sum(int(record.meta_info.get("num_retractions", 0)) for record in answered),
        "prefix_hit_rate": round(
            sum(int(r.meta_info.get("cached_tokens", 0)) for r in answered) / sum(r.prompt_len for r in answered), 4
        ),
        "compactions": compactions,
        "compressed_share": round(sum(record.num_compactions > 0 for record in answered) / len(answered), 4),
        "compaction_gaps": len(own),
        "single_token_chunks": round(alone / max(len(gaps), 1), 4),
        "output_len_mean": round(statistics.mean(lengths), 2),
        "output_len_min": min(lengths),
        "output_len_max": max(lengths),
        "note": NOTHING_COMPRESSED if config is not None and compactions == 0 else "",
    }
    for name, values in {
        "ttft": [record.chunks[0][0] - record.sent_s for record in answered],
        "itl": gaps,
        "itl_compaction": own,
        "queue": [float(r.meta_info["queue_time"]) for r in answered if "queue_time" in r.meta_info],
    }.items():
        columns[f"{name}_p50"], columns[f"{name}_p99"] = (round(value, 3) for value in percentiles_ms(values))
    return columns


def require_equal_memory(rows: Iterable[Row]) -> None:
    """Raise ``ValueError`` if a policy had more memory than a server without one of the same pool in tokens.

    Where the pool is a share of the GPU's memory, SGLang divides what it finds, and equality is not checked.
    """
    rows = [row for row in rows if float(row["pool"]) >= 1]
    for row in rows:
        sizes = [int(r["memory_bytes"]) for r in rows if r["pool"] == row["pool"] and r["policy"] == NO_POLICY]
        if sizes and int(row["memory_bytes"]) > min(sizes):
            raise ValueError(
                f"{row['setting']} had {row['memory_bytes']} bytes of memory at pool {row['pool']:g}, "
                f"a server without a policy {min(sizes)}"
            )


@dataclass(frozen=True)
class Ratio:
    """Throughput of a setting over the baseline's, within each round."""

    median: float
    low: float
    high: float
    by_round: tuple[float, ...]
    # Rounds in which nothing was compressed.
    uncompressed: int

    @property
    def verdict(self) -> str:
        """Whether the setting has more throughput: only where there are several rounds and all of them agree."""
        if self.uncompressed:
            return NOTHING_COMPRESSED
        if len(self.by_round) < 2:
            return "one round: no verdict"
        return "more" if self.low > 1 else "less" if self.high < 1 else "rounds disagree"


def crossover(ratios: Mapping[float, Ratio]) -> str:
    """Say between which pools a setting stops to have more throughput; ``ratios`` are those of one setting by pool.

    Pools at which a round compressed nothing are left out.
    """
    pools = sorted(pool for pool, ratio in ratios.items() if not ratio.uncompressed)
    if not pools:
        return NOTHING_COMPRESSED
    more = [pool for pool in pools if ratios[pool].median > 1]
    if not more:
        return "more at no pool"
    if len(more) == len(pools):
        return f"more at every pool, so the crossover lies above {pools[-1]:g}"
    if more != pools[: len(more)]:
        return f"more at pools {', '.join(f'{pool:g}' for pool in more)} and no others: no single crossover"
    return f"more up to pool {more[-1]:g} and not from {pools[len(more)]:g} on: the crossover lies between"


def throughput_ratios(rows: Iterable[Row], baseline: str) -> dict[tuple[str, str, float], Ratio]:
    """Return by (arrivals, setting, pool) the throughput over that of the baseline in the same round and pool.

    Settings and rounds without a baseline are left out.
    """
    rows = list(rows)
    base = {(r["arrivals"], r["pool"], r["round"]): float(r["tokens_per_s"]) for r in rows if r["setting"] == baseline}
    found: dict[tuple[str, str, float], list[tuple[float, bool]]] = {}
    for row in rows:
        at = (row["arrivals"], row["pool"], row["round"])
        if row["setting"] != baseline and at in base:
            key = (str(row["arrivals"]), str(row["setting"]), float(row["pool"]))
            found.setdefault(key, []).append((float(row["tokens_per_s"]) / base[at], bool(row["note"])))
    return {
        key: Ratio(
            statistics.median(values := [ratio for ratio, _ in runs]),
            min(values),
            max(values),
            tuple(values),
            sum(idle for _, idle in runs),
        )
        for key, runs in found.items()
    }
