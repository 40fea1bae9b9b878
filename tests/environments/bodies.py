"""The bodies that a server without a policy sends, byte for byte: to be compared between SGLangs.

python -m tests.environments.bodies FILE   with the SGLang that Python finds, as JSON
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import sglang

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import random_ids
from tests.support.harness.server import Server

FLAGS = ["--model-path", str(tiny_model_path("llama-gqa")), "--page-size", "16", "--max-total-tokens", "4096"]
NUM_TOKENS = 40
EVENT = "data: "
# Ids, moments and durations; every other byte counts.
VARYING = re.compile(rb'"(id|created|e2e_latency|response_sent_to_client_ts)":("[^"]*"|[-+.eE\d]+|null)')
# A busy machine makes one event of two tokens, so streams are asked for more than once. What is sampled depends, on a
# CPU, on all that was sampled since the start, so a try is compared with the same try of the other server.
NUM_TRIES = 5


def payloads() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, request): both kinds of endpoint, greedy and seeded, streaming and not, with log-probabilities."""
    rng = random.Random(1)
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "sampling_seed": 7},
        {"temperature": 0.0, "frequency_penalty": 0.6, "repetition_penalty": 1.2, "min_new_tokens": 8},
        {"temperature": 0.0, "regex": r"([a-f]{3}=[0-9]{2};){4}"},
    ]
    for sampling in samplings:
        prompt = random_ids(rng, 50)
        params = {"max_new_tokens": NUM_TOKENS, "ignore_eos": "regex" not in sampling, **sampling}
        for stream in (False, True):
            body = {"input_ids": prompt, "sampling_params": params, "stream": stream}
            yield "/generate", body
            logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
            yield "/generate", {**body, **logprobs, "return_text_in_logprobs": True}
    chat = {"messages": [{"role": "user", "content": "count on"}], "max_tokens": NUM_TOKENS, "ignore_eos": True}
    text = {"prompt": "one two three", "max_tokens": NUM_TOKENS, "ignore_eos": True}
    for stream in (False, True):
        for sampling in ({"temperature": 0}, {"temperature": 0.9, "seed": 5}):
            common = {"model": "default", "stream": stream, **sampling}
            yield "/v1/chat/completions", {**chat, **common, "logprobs": True, "top_logprobs": 3}
            yield "/v1/completions", {**text, **common, "logprobs": 2}
    yield "/generate", {"text": "a bad one", "sampling_params": {"temperature": -1}}
    yield "/v1/chat/completions", {"model": "default", "messages": []}


def without_varying(body: bytes) -> bytes:
    """Return a body with ids, moments and durations blanked."""
    return VARYING.sub(rb'"\1":*', body)


def record() -> list[dict[str, Any]]:
    """Start a server, ask it everything, one request after another; return what came back."""
    found = []
    with Server(FLAGS, with_probe=False) as server:
        for path, payload in payloads():
            tries = []
            for _ in range(NUM_TRIES if payload.get("stream") else 1):
                answer = requests.post(f"{server.url}{path}", json=payload, timeout=300)
                tries.append(f"{answer.status_code} {without_varying(answer.content).decode('latin-1')}")
                # So that each try finds the same cache, once the scheduler is done with the last token.
                requests.post(f"{server.url}/flush_cache", params={"timeout": 30}, timeout=60).raise_for_status()
            found.append({"path": path, "request": payload, "tries": tries})
    return found


def differences(stock: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[str]:
    """Return one line for every request that was not answered alike; streams are compared where no event is missing."""
    problems = []
    for one, two in zip(stock, other, strict=True):
        pairs = list(zip(one["tries"], two["tries"], strict=True))
        most = max(body.count(EVENT) for pair in pairs for body in pair)
        whole = [pair for pair in pairs if all(body.count(EVENT) == most for body in pair)]
        name = f"{one['path']} {one['request']}"
        if not whole:
            problems.append(f"{name}: no stream came whole from both servers; try again on a quieter machine")
        for first, second in whole:
            if first != second:
                place = next(i for i, (a, b) in enumerate(zip(first + "\0", second + "\0", strict=False)) if a != b)
                problems.append(f"{name}: {first[place:][:100]!r} and {second[place:][:100]!r}")
    return problems


def main(argv: list[str]) -> int:
    """Record all bodies; returns the exit status."""
    found = {"sglang": str(Path(sglang.__file__).parent), "bodies": record()}
    Path(argv[0]).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
