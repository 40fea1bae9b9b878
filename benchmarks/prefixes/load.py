"""Part ``load``: many requests over one document, which is held whole or in a named prefix."""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common.asking import ask_side_by_side
from benchmarks.common.schema import Row
from benchmarks.common.settings import Setting, no_policy
from benchmarks.prefixes.servers import Servers, decode_peaks
from devtools.launch import Server, ServerError
from rkv_sglang.client.prefixes import Prefixes
from rkv_sglang.config import PREFIX_FIELD

TASK_LEN = 32
NAME = "document"
WHOLE = 0
TIMEOUT_S = 3600


@dataclass(frozen=True)
class Answer:
    """What came of one request: seconds to its first token, and what the server says of it."""

    first_s: float
    meta_info: dict[str, Any]


def draw(rng: random.Random, vocabulary: Sequence[int], length: int) -> list[int]:
    """Return a text of random tokens."""
    return rng.choices(vocabulary, k=length)


def measure(options: argparse.Namespace, servers: Servers, flags: tuple[str, ...]) -> list[Row]:
    """Return one row per round, server and number of kept tokens.

    Raises:
        ServerError: A server did not start, or a request failed.
        ValueError: A server refuses to make a prefix; one line.
    """
    ways = [(no_policy(), WHOLE), (options.setting, WHOLE), *((options.setting, kept) for kept in options.kept)]
    up = servers.only(options.model, [no_policy(), options.setting], flags)
    vocabulary = _vocabulary(options.model)
    rng = random.Random(0)
    rows: list[Row] = []
    for number in range(options.rounds):
        document, task = (draw(rng, vocabulary, length) for length in (options.document_len, TASK_LEN))
        prompts = [draw(rng, vocabulary, options.prompt_len) for _ in range(options.num_requests)]
        for setting, kept in ways:
            print(f"round {number + 1}, {setting.name}, {kept or 'all'} of {len(document)} tokens ...", flush=True)
            row = _run(up[setting.name], document, task, prompts, kept, options.num_tokens)
            row |= {"round": number, "setting": setting.name, "kept": kept, "pool": options.pool}
            row |= {"budget": setting.budget, "buffer": setting.buffer}
            rows.append(row)
            print(f"  {row['tokens_per_s']} tokens/s, first token {row['ttft_p50']} ms", flush=True)
    return rows


def _run(
    server: Server, document: list[int], task: list[int], prompts: list[list[int]], kept: int, num_tokens: int
) -> Row:
    # Named prefixes go with it.
    server.flush_cache()
    prefixes = Prefixes(server.url) if kept else None
    start = time.perf_counter()
    if prefixes is None:
        server.generate([document], 1)
    else:
        prefixes.create(NAME, document, task, kept)
    prepare_s = time.perf_counter() - start
    offset = server.log_path.stat().st_size
    start = time.perf_counter()
    jobs = range(len(prompts))

    def ask(job: int) -> Answer:
        return _ask(server, prompts[job] if kept else [*document, *prompts[job]], kept, num_tokens)

    answers = [answer for _, answer in ask_side_by_side(ask, jobs, len(prompts))]
    seconds = time.perf_counter() - start
    return load_row(answers, server.log_since(offset), prepare_s=prepare_s, seconds=seconds, num_tokens=num_tokens) | {
        "document_len": len(document),
        "prompt_len": len(prompts[0]),
    }


def _ask(server: Server, input_ids: list[int], kept: int, num_tokens: int) -> Answer:
    start = time.perf_counter()
    payload = {
        "input_ids": input_ids,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": num_tokens,
            "ignore_eos": True,
            # The first token comes at once whatever the interval.
            "stream_interval": num_tokens,
            "custom_params": {PREFIX_FIELD: NAME} if kept else {},
        },
    }
    first_s, output_ids, meta_info = 0.0, [], {}
    for event in server.stream_generate(payload, TIMEOUT_S):
        first_s = first_s or time.perf_counter() - start
        output_ids, meta_info = event["output_ids"], event["meta_info"]
    if len(output_ids) != num_tokens:
        raise ServerError(f"an answer has {len(output_ids)} tokens instead of {num_tokens}; its log: {server.log_path}")
    return Answer(first_s, meta_info)


def load_row(answers: Sequence[Answer], log: str, *, prepare_s: float, seconds: float, num_tokens: int) -> Row:
    """Return the figures of one run.

    Args:
        log: What the server printed while it answered.
    """
    slots_held, peak_running, retractions = decode_peaks(log)
    first_ms = [1e3 * answer.first_s for answer in answers]
    return {
        "prepare_s": round(prepare_s, 2),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(len(answers) * num_tokens / seconds, 1),
        "ttft_p50": round(float(np.quantile(first_ms, 0.5)), 1),
        "ttft_p99": round(float(np.quantile(first_ms, 0.99)), 1),
        "slots_held": slots_held,
        "peak_running": peak_running,
        "retractions": retractions,
        "compactions": sum(answer.meta_info.get("kv_compactions", 0) for answer in answers),
        "cached_tokens": sum(answer.meta_info["cached_tokens"] for answer in answers),
        "num_requests": len(answers),
        "num_tokens": num_tokens,
    }


def _vocabulary(model: str) -> list[int]:
    """Return a model's tokens but for the special ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    special = set(tokenizer.all_special_ids)
    return [token for token in range(len(tokenizer)) if token not in special]


def least_pool(options: argparse.Namespace) -> int:
    """Return what the largest of the prefixes needs while it is made."""
    return int(options.document_len) + TASK_LEN + max(options.kept) + 1


def context_len(options: argparse.Namespace) -> int:
    """Return what the longest request needs."""
    return int(options.document_len) + max(TASK_LEN, options.prompt_len) + int(options.num_tokens) + 8


def setting_problem(setting: Setting) -> str | None:
    """Return one line if a server of this setting makes no prefixes."""
    return None if setting.config else "--setting none makes no prefixes: name a policy, such as rkv:64:32"
