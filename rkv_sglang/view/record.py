"""Have a running server generate an answer and record what its KV cache kept."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

from tqdm import tqdm

from rkv_sglang.config import NO_POLICY
from rkv_sglang.messages import one_line, shown
from rkv_sglang.view.http import open_url
from rkv_sglang.view.token_text import token_texts
from rkv_sglang.view.trace import Trace

# On a command line a key is seen by everybody on the machine.
API_KEY_VARIABLE = "RKV_SGLANG_API_KEY"
ANSWER_TIMEOUT_S = 600
INFO_TIMEOUT_S = 30
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
    info = _server_info(server, api_key)
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


def _server_info(server: str, api_key: str | None) -> dict[str, Any]:
    """Return ``GET /server_info`` of a server with a policy."""
    if not server.startswith(("http://", "https://")):
        raise ValueError(f"--server {server} is no address: write http://{server}")
    with _opened(server, "/server_info", None, INFO_TIMEOUT_S, api_key) as response:
        try:
            info = json.load(response)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{server} is no SGLang server: its /server_info is not JSON") from error
    if not isinstance(info, dict) or info.get("kv_policy", NO_POLICY) == NO_POLICY:
        raise ValueError(f"{server} has no policy to look at: start it with --kv-policy rkv --kv-trace")
    return info


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
        _opened(server, "/generate", payload, ANSWER_TIMEOUT_S, api_key) as response,
        tqdm(total=total, unit="token", desc="answer", leave=False, disable=None) as progress,
    ):
        for event in stream_events(server, response):
            meta_info = event["meta_info"]
            _raise_refusal(event)
            new_rows = meta_info["output_token_logprobs"]
            text = text + event["text"] if incremental else event["text"]
            rows = rows + new_rows if incremental else new_rows
            progress.update(len(rows) - progress.n)
    if not meta_info.get("finish_reason"):
        raise ValueError(f"{server} stopped in the middle of the answer: look into its log")
    if "kv_trace" not in meta_info:
        raise ValueError(f"{server} recorded nothing: start it with --kv-policy rkv --kv-trace")
    return text, rows, meta_info


def _raise_refusal(event: dict[str, Any]) -> None:
    """Pass on that a server refuses or gives up a request whose stream had begun."""
    reason = event["meta_info"].get("finish_reason")
    if reason and reason["type"] == "abort":
        raise ValueError(f"the server refuses: {one_line(reason.get('message'))}")


def _opened(server: str, path: str, payload: dict[str, Any] | None, timeout_s: float, api_key: str | None) -> Any:
    """Send a request and return the response; a GET without ``payload``."""
    body = None if payload is None else json.dumps(payload).encode()
    try:
        return open_url(server + path, body=body, timeout_s=timeout_s, api_key=api_key)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ValueError(
                f"the server wants its key (status {error.code}): give --api-key, or the variable {API_KEY_VARIABLE}"
            ) from error
        raise ValueError(f"the server refuses (status {error.code}): {_refusal(error)}") from error
    except urllib.error.URLError as error:
        raise ValueError(f"{server} does not answer ({one_line(error.reason)}): is a server running there?") from error
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{server} does not answer as a server ({one_line(error)}): check --server") from error


def stream_events(server: str, response: Any) -> Iterator[dict[str, Any]]:
    """Yield the events of a streamed answer of SGLang, until it says that it is done.

    Args:
        server: What to call the server in a message.
        response: The lines of the answer, bytes.

    Raises:
        ValueError: The server refused, broke off, or sent what is no JSON; one line.
    """
    try:
        for line in response:
            data = line.decode().strip().removeprefix("data:").strip()
            if data == "[DONE]":
                return
            if data:
                event = json.loads(data)
                if "error" in event:
                    raise ValueError(f"the server refuses: {one_line(_message(event))}")
                yield event
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{server} answers unlike SGLang: an event of its stream is not JSON") from error
    except (OSError, HTTPException) as error:
        raise ValueError(f"{server} broke off in the middle of the answer ({one_line(error)})") from error
    raise ValueError(f"{server} stopped in the middle of the answer: look into its log")


def _refusal(error: urllib.error.HTTPError) -> str:
    """Return what the server says, or the status's own words if that is not in its form."""
    try:
        return one_line(_message(json.load(error)))
    except (OSError, HTTPException, ValueError, LookupError, TypeError, RecursionError):
        return one_line(error.reason)


def _message(answer: Any) -> Any:
    said = answer["error"]
    return said["message"] if isinstance(said, dict) else said
