"""Have a running server generate an answer and record what its KV cache kept."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from rkv_sglang.client.server import opened, raise_refusal, server_info, stream_events
from rkv_sglang.messages import shown
from rkv_sglang.view.token_text import token_texts
from rkv_sglang.view.trace import Trace

ANSWER_TIMEOUT_S = 600
NO_POLICY_TO_SEE = "has no policy to look at: start it with --kv-policy rkv --kv-trace"
# Every event repeats the whole answer so far, so a long answer comes in few of them.
MOST_EVENTS = 64


def record(server: str, prompt: str, *, max_new_tokens: int, temperature: float, api_key: str | None = None) -> Trace:
    """Generate with a progress bar on a terminal, and return the trace.

    Args:
        server: The server's address, ``http://host:port``.
        prompt: Sent as it is, without a chat template.
        api_key: What the server was started with as ``--api-key``.

    Raises:
        ValueError: There is no such server, it records nothing, it refuses the request, or its answer makes no sense;
            one line.
    """
    server = server.rstrip("/")
    info = server_info(server, api_key, without=NO_POLICY_TO_SEE)
    payload = {
        "text": prompt,
        "stream": True,
        "return_logprob": True,
        "return_text_in_logprobs": True,
        "sampling_params": {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "stream_interval": max(1, max_new_tokens // MOST_EVENTS),
            # The text then has a place for every token.
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "custom_params": {"kv_trace": True},
        },
    }
    try:
        incremental = bool(info.get("incremental_streaming_output"))
        text, rows, meta_info = _generate(server, payload, incremental, api_key)
        recorded = meta_info["kv_trace"]
        return Trace(
            model=info["model_path"],
            policy=meta_info["kv_policy"],
            budget=info["kv_budget"],
            buffer=info["kv_buffer"],
            window=info["kv_window"],
            tp_size=info["tp_size"],
            prompt=prompt,
            prompt_len=meta_info["prompt_tokens"],
            num_layers=recorded["num_layers"],
            num_kv_heads=recorded["num_kv_heads"],
            tokens=token_texts([row[2] for row in rows], text),
            token_ids=[row[1] for row in rows],
            compactions=recorded["compactions"],
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{server} answers unlike SGLang with rkv_sglang ({shown(error)} in its answer)") from error


def _generate(
    server: str, payload: dict[str, Any], incremental: bool, api_key: str | None
) -> tuple[str, list[list[Any]], dict[str, Any]]:
    """Return the answer's text, a row (log-probability, id, text) for every token, and the final ``meta_info``.

    Args:
        incremental: Whether the server sends only what is new since the event before, instead of all so far.
    """
    text = ""
    rows: list[list[Any]] = []
    meta_info: dict[str, Any] = {}
    total = payload["sampling_params"]["max_new_tokens"]
    with (
        opened(server, "/generate", payload, ANSWER_TIMEOUT_S, api_key) as response,
        tqdm(total=total, unit="token", desc="answer", leave=False, disable=None) as progress,
    ):
        for event in stream_events(server, response):
            meta_info = event["meta_info"]
            raise_refusal(event)
            new_rows = meta_info["output_token_logprobs"]
            text = text + event["text"] if incremental else event["text"]
            rows = rows + new_rows if incremental else new_rows
            progress.update(len(rows) - progress.n)
    if not meta_info.get("finish_reason"):
        raise ValueError(f"{server} stopped in the middle of the answer: look into its log")
    if "kv_trace" not in meta_info:
        raise ValueError(f"{server} recorded nothing: start it with --kv-policy rkv --kv-trace")
    return text, rows, meta_info
