"""Replay a trace against a server and record when each token came.

SGLang's own client (``sglang.benchmark.serving``) does not fit. Of ``meta_info`` it keeps no more than cached tokens
and speculation, so neither compactions nor queue time nor retractions can be told; its multi-turn requests are chats
of text, whose prompts need not be the tokens that the cache holds; and it cannot be imported without the package
``datasets``, which a server does not need. Its definitions of TTFT, inter-token latency and throughput are kept
(``rows.py``).
"""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks.serving.rows import RequestRecord
from benchmarks.serving.trace import Conversation, Turn, next_prompt

# A chunk of a stream is short; this is only room for bursts.
READ_BUFFER_BYTES = 2**20


def replay(
    url: str, trace: Sequence[Conversation], *, timeout_s: float, ignore_eos: bool = True, progress: tqdm | None = None
) -> list[RequestRecord]:
    """Send a trace to the server and return one record per request; times count from the start of the replay.

    Args:
        url: The server's address.
        trace: Conversations with their arrivals.
        timeout_s: Time limit of the whole replay.
        ignore_eos: Whether every answer has the turn's full length.
        progress: Told of every request that ended.

    Raises:
        TimeoutError: The replay took longer than ``timeout_s``.
    """
    return asyncio.run(_replay(url, trace, timeout_s, ignore_eos, progress))


async def _replay(
    url: str, trace: Sequence[Conversation], timeout_s: float, ignore_eos: bool, progress: tqdm | None
) -> list[RequestRecord]:
    # One limit for the whole, below; aiohttp would give every request 5 minutes.
    timeout = aiohttp.ClientTimeout(total=None)
    # By default aiohttp has at most 100 connections, and would queue where the server should.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        url, timeout=timeout, connector=connector, read_bufsize=READ_BUFFER_BYTES
    ) as session:
        start_s = time.perf_counter()
        runs = [_converse(session, one, start_s, ignore_eos, progress) for one in trace]
        async with asyncio.timeout(timeout_s):
            records = await asyncio.gather(*runs)
    return [record for conversation in records for record in conversation]


async def _converse(
    session: aiohttp.ClientSession, conversation: Conversation, start_s: float, ignore_eos: bool, progress: tqdm | None
) -> list[RequestRecord]:
    """Return the records of a conversation; it ends with the first request that fails."""
    # A loop's timer may end some microseconds early, and a request must not be sent before it arrived.
    while (wait_s := start_s + conversation.arrival_s - time.perf_counter()) > 0:
        await asyncio.sleep(wait_s)
    records: list[RequestRecord] = []
    prompt: list[int] = []
    answer: list[int] = []
    for turn in conversation.turns:
        prompt = next_prompt(prompt, answer, turn)
        record, answer = await _ask(session, prompt, turn, start_s, ignore_eos)
        records.append(record)
        if progress is not None:
            progress.update()
        if record.error is not None:
            break
    return records


async def _ask(
    session: aiohttp.ClientSession, prompt: list[int], turn: Turn, start_s: float, ignore_eos: bool
) -> tuple[RequestRecord, list[int]]:
    """Send one request and return its record and the generated token ids."""
    sampling_params = {"temperature": 0, "max_new_tokens": turn.output_len, "ignore_eos": ignore_eos}
    payload = {"input_ids": prompt, "sampling_params": sampling_params, "stream": True}
    answer: list[int] = []
    chunks: list[tuple[float, int]] = []
    meta_info: dict[str, Any] = {}
    error = None
    sent_s = time.perf_counter() - start_s
    try:
        async with session.post("/generate", json=payload) as response:
            async for line in response.content:
                now_s = time.perf_counter() - start_s
                data = line.strip().removeprefix(b"data:").strip()
                if not data or data == b"[DONE]":
                    continue
                event = json.loads(data)
                if response.status != 200 or "error" in event:
                    error = str(event.get("error", event))
                    continue
                meta_info = event["meta_info"]
                # Servers of this benchmark stream differences: token ids that earlier chunks did not have.
                answer += event["output_ids"]
                if event["output_ids"]:
                    chunks.append((now_s, len(answer)))
    except (aiohttp.ClientError, json.JSONDecodeError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    finish = meta_info.get("finish_reason") or {}
    if error is None and finish.get("type") not in ("length", "stop"):
        error = f"finish reason {finish}"
    return RequestRecord(len(prompt), sent_s, tuple(chunks), meta_info, error), answer
