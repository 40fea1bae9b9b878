"""A mixed load of which every answer is known: whole answers, streams, aborts, clients that leave, own settings."""

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from devtools.launch import Server, ServerError
from devtools.tiny_models import VOCAB_SIZE
from rkv_sglang.client.http import open_url

# How often each way to ask is taken.
WAYS = {"whole": 5, "stream": 3, "abort": 1, "leave": 1}
TIMEOUT_S = 600
FIRST_ID = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question that is asked again and again: token ids, tokens to generate, and what it asks of the policy."""

    prompt: tuple[int, ...]
    num_tokens: int
    custom_params: dict[str, Any] = field(hash=False)

    def body(self, rid: str) -> dict[str, Any]:
        """Return the body for ``/generate``: greedy, no early end."""
        sampling = {"temperature": 0, "max_new_tokens": self.num_tokens, "ignore_eos": True}
        return {
            "rid": rid,
            "input_ids": list(self.prompt),
            "sampling_params": {**sampling, "custom_params": self.custom_params},
        }


def make_cases(rng: random.Random, count: int, budget: int, buffer: int) -> list[Case]:
    """Return different questions: short and long ones, half of them with a common beginning, with lengths around those
    at which the server's settings, or their own, compact."""
    shared = _ids(rng, 40)
    own: tuple[dict[str, Any], ...] = (
        *({}, {}, {}, {"kv_policy": "none"}, {"kv_trace": True}),
        *({"kv_budget": budget // 2, "kv_buffer": buffer // 2}, {"kv_budget": 2 * budget}),
    )
    capacity = budget + buffer
    lengths = (1, budget, capacity, capacity + 1, capacity + buffer + 1, 2 * capacity, 3 * capacity + 5)
    return [
        Case(
            prompt=(*(shared if number % 2 else ()), *_ids(rng, rng.choice((1, 7, 16, 60)))),
            num_tokens=lengths[number % len(lengths)],
            custom_params=rng.choice(own),
        )
        for number in range(count)
    ]


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_ID, VOCAB_SIZE) for _ in range(count))


def ask_alone(server: Server, cases: Sequence[Case]) -> list[list[int]]:
    """Return the answer of each case, asked when nothing else runs and nothing is cached."""
    answers = []
    for number, case in enumerate(cases):
        server.flush_cache()
        answers.append(_whole(server, case.body(f"alone-{number}")))
    return answers


def _whole(server: Server, body: dict[str, Any]) -> list[int]:
    with open_url(server.url + "/generate", body=json.dumps(body).encode(), timeout_s=TIMEOUT_S) as response:
        answer: list[int] = json.load(response)["output_ids"]
    return answer


class Load:
    """Clients that ask at random until they are stopped, and what came of it.

    Attributes:
        counts: Requests by the way they were asked, and ``mismatches`` and ``errors``.
        problems: The first of both, in words.
        latencies_s: Of every whole answer since they were last taken; ``tokens`` likewise counts all that came.
    """

    def __init__(self, server: Server, cases: Sequence[Case], answers: Sequence[list[int]], seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._server, self._cases, self._answers, self._seed = server, cases, answers, seed
        self._lock = threading.Lock()
        self._latencies_s: list[float] = []
        self._tokens = 0

    @contextlib.contextmanager
    def running(self, num_clients: int, part: int) -> Iterator[None]:
        """Ask during the block; behind it no request is under way."""
        stop = threading.Event()
        # Daemons: an interrupt ends the server, and with it what they wait for.
        clients = [
            threading.Thread(target=self._ask_until, args=(stop, f"{self._seed}-{part}-{number}"), daemon=True)
            for number in range(num_clients)
        ]
        for client in clients:
            client.start()
        yield
        stop.set()
        for client in clients:
            client.join()

    def take(self) -> tuple[list[float], int]:
        """Return the latencies and the number of tokens since the last call."""
        with self._lock:
            taken = self._latencies_s, self._tokens
            self._latencies_s, self._tokens = [], 0
        return taken

    def _ask_until(self, stop: threading.Event, name: str) -> None:
        rng, number = random.Random(name), 0
        while not stop.is_set():
            number += 1
            which, way = rng.randrange(len(self._cases)), rng.choices(list(WAYS), list(WAYS.values()))[0]
            case, expected = self._cases[which], self._answers[which]
            cut = rng.randint(1, case.num_tokens)
            start = time.monotonic()
            try:
                found = self._ask(case.body(f"{name}-{number}"), way, cut)
            except (OSError, ValueError, LookupError, ServerError) as error:
                self._note("errors", f"case {which}, {way}: {type(error).__name__}: {error}")
                # A server that is gone fails at once, a thousand times a second.
                stop.wait(1)
                continue
            is_cut = way in ("abort", "leave")
            if found != (expected[: len(found)] if is_cut else expected):
                place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
                self._note("mismatches", f"case {which}, {way}, {name}-{number}: other tokens from number {place} on")
            with self._lock:
                self.counts[way] += 1
                self._tokens += len(found)
                if way == "whole":
                    self._latencies_s.append(time.monotonic() - start)

    def _note(self, kind: str, problem: str) -> None:
        with self._lock:
            self.counts[kind] += 1
            if len(self.problems) < 20:
                self.problems.append(problem)

    def _ask(self, body: dict[str, Any], way: str, cut: int) -> list[int]:
        if way == "whole":
            return _whole(self._server, body)
        found: list[int] = []
        # Closed in time, it closes the connection.
        with contextlib.closing(self._server.stream_generate(body, TIMEOUT_S)) as events:  # type: ignore[type-var]
            for event in events:
                found = event["output_ids"]
                if way == "leave" and len(found) >= cut:
                    break
                if way == "abort" and len(found) >= cut:
                    abort = json.dumps({"rid": body["rid"]}).encode()
                    open_url(self._server.url + "/abort_request", body=abort, timeout_s=TIMEOUT_S).close()
                    # The answer ends by itself, maybe a few tokens later.
                    way = "aborted"
        return found
