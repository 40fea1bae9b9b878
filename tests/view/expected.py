"""What the page must show, computed from lists of positions, and traces to show."""

import random
from dataclasses import dataclass

from rkv_sglang.view.trace import Trace
from tests.cache.trace_cases import History, Pair

WORDS = (" the", " so", ",", ".", "\n", "\n\n", " wait", "ing", " =", " 12", "", "\t")


def trace_of(history: History, rng: random.Random, *, tokens: list[str] | None = None, ids=None, **changes) -> Trace:
    """Return a trace with a history's compactions, and with token texts and ids that are given or random."""
    fields = {
        "model": "org/model",
        "policy": "rkv",
        "budget": history.budget,
        "buffer": history.buffer,
        "window": 1,
        "tp_size": 1,
        "prompt": "What is it?\n",
        "prompt_len": 5,
        "num_layers": history.num_layers,
        "num_kv_heads": history.num_kv_heads,
        "tokens": tokens or [rng.choice(WORDS) for _ in range(history.num_tokens)],
        "token_ids": ids or [rng.randrange(50000) for _ in range(history.num_tokens)],
        "compactions": history.compactions,
    }
    return Trace(**{**fields, **changes})


@dataclass
class Shown:
    """One moment: tokens generated so far, the last compaction (0: none yet), and what every pair holds."""

    length: int
    compaction: int
    held: dict[Pair, set[int]]


def all_held(history: History, length: int) -> Shown:
    """Return the moment at a length up to which nothing was evicted."""
    return Shown(length, 0, {pair: set(range(length)) for pair in history.pairs})


def at_compaction(history: History, compaction: int) -> Shown:
    """Return the moment after a compaction; 0 is just before the first."""
    if compaction == 0:
        return all_held(history, history.lengths[0] if history.lengths else history.num_tokens)
    held = {pair: set(positions) for pair, positions in history.held[compaction - 1].items()}
    return Shown(history.lengths[compaction - 1], compaction, held)


def at_length(history: History, length: int) -> Shown:
    """Return the moment when so many tokens were generated, or the answer was complete."""
    length = min(length, history.num_tokens)
    compaction = sum(compacted <= length for compacted in history.lengths)
    if compaction == 0:
        return all_held(history, length)
    since = set(range(history.lengths[compaction - 1], length))
    held = {pair: {*positions} | since for pair, positions in history.held[compaction - 1].items()}
    return Shown(length, compaction, held)


def count(shown: Shown, token: int) -> int:
    """Return how many pairs hold a token, -1 if it is not generated yet."""
    if token >= shown.length:
        return -1
    return sum(token in positions for positions in shown.held.values())


def numbers(shown: Shown) -> dict[str, float]:
    """Return the five numbers above the text."""
    kept = list(shown.held.values())
    (held,) = {len(positions) for positions in kept}
    return {
        "generated": shown.length,
        "held": held,
        "evicted": shown.length - held,
        "all": len(set.intersection(*kept)),
        "none": shown.length - len(set.union(*kept)),
    }


def age(shown: Shown, pair: Pair) -> float:
    positions = shown.held[pair]
    return sum(shown.length - 1 - token for token in positions) / len(positions)


def agreement(shown: Shown, pair: Pair) -> float:
    positions = shown.held[pair]
    shared = [token for token in positions if count(shown, token) > len(shown.held) / 2]
    return len(shared) / len(positions)


def until(history: History, pair: Pair, token: int, compaction: int) -> int:
    """Return which compaction, of those since the cache was last computed, evicts a token; 0 if none does."""
    number = max(compaction, 1) - 1
    first = max(start for start in history.starts if start <= number)
    end = min((start for start in history.starts if start > number), default=len(history.held))
    for other in range(first, end):
        if token < history.lengths[other] and token not in history.held[other][pair]:
            return other + 1
    return 0


def overlap(shown: list[Shown], common: int, pairs: list[Pair]) -> tuple[int, int]:
    """Return how many tokens of the common start both traces hold, and either, over pairs."""
    start = set(range(min(common, *(moment.length for moment in shown))))
    first, second = shown
    both = sum(len(first.held[pair] & second.held[pair] & start) for pair in pairs)
    either = sum(len((first.held[pair] | second.held[pair]) & start) for pair in pairs)
    return both, either
