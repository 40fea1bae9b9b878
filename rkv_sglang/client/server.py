"""Requests to an SGLang server; whatever goes wrong is a ``ValueError`` of one line."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

from rkv_sglang.client.http import open_url
from rkv_sglang.config import NO_POLICY
from rkv_sglang.messages import one_line

# On a command line a key is seen by everybody on the machine.
API_KEY_VARIABLE = "RKV_SGLANG_API_KEY"
INFO_TIMEOUT_S = 30


def opened(server: str, path: str, payload: dict[str, Any] | None, timeout_s: float, api_key: str | None) -> Any:
    """Send a request and return the response; a GET without ``payload``.

    Args:
        server: The server's address, ``http://host:port``.

    Raises:
        ValueError: There is no such server, or it refuses; one line, with what the server says.
    """
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


def answered(server: str, path: str, payload: dict[str, Any] | None, timeout_s: float, api_key: str | None) -> Any:
    """Send a request as ``opened`` does and return its decoded answer.

    Raises:
        ValueError: As ``opened``, or the answer is not JSON; one line.
    """
    with opened(server, path, payload, timeout_s, api_key) as response:
        try:
            return json.load(response)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{server} is no SGLang server: its {path} is not JSON") from error
        except (OSError, HTTPException) as error:
            raise ValueError(f"{server} broke off in the middle of the answer ({one_line(error)})") from error


def server_info(server: str, api_key: str | None, *, without: str) -> dict[str, Any]:
    """Return ``GET /server_info`` of a server with a policy.

    Args:
        without: What to say, behind the server's address, of one that has none.

    Raises:
        ValueError: It is no such server; one line.
    """
    if not server.startswith(("http://", "https://")):
        raise ValueError(f"--server {server} is no address: write http://{server}")
    info = answered(server, "/server_info", None, INFO_TIMEOUT_S, api_key)
    if not isinstance(info, dict) or info.get("kv_policy", NO_POLICY) == NO_POLICY:
        raise ValueError(f"{server} {without}")
    return info


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


def raise_refusal(answer: dict[str, Any]) -> None:
    """Pass on that a server refuses or gives up a request that it had begun to answer.

    Args:
        answer: One of ``/generate``, or an event of it.

    Raises:
        ValueError: It does; one line.
    """
    reason = answer["meta_info"].get("finish_reason")
    if reason and reason["type"] == "abort":
        raise ValueError(f"the server refuses: {one_line(reason.get('message'))}")


def _refusal(error: urllib.error.HTTPError) -> str:
    """Return what the server says, or the status's own words if that is not in its form."""
    try:
        return one_line(_message(json.load(error)))
    except (OSError, HTTPException, ValueError, LookupError, TypeError, RecursionError):
        return one_line(error.reason)


def _message(answer: Any) -> Any:
    # Endpoints after OpenAI's put it beside the other fields of the error.
    said = answer["error"] if "error" in answer else answer["message"]
    return said["message"] if isinstance(said, dict) else said
