"""HTTP to a server. One on this machine is reached directly, whatever proxies the environment names."""

from __future__ import annotations

import ipaddress
import urllib.parse
import urllib.request
from typing import Any


def is_loopback(url: str) -> bool:
    """Return whether a URL's host is this machine's loopback, by its name or address alone."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_url(
    url: str, *, body: bytes | None = None, method: str | None = None, timeout_s: float, api_key: str | None = None
) -> Any:
    """Send a request and return the open response; a POST of JSON with ``body``, else a GET, unless ``method`` says.

    Args:
        api_key: Sent as a bearer token.

    Raises:
        OSError: As ``urllib.request.urlopen``.
    """
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url, body, headers, method=method)
    proxies = [urllib.request.ProxyHandler({})] if is_loopback(url) else []
    return urllib.request.build_opener(*proxies).open(request, timeout=timeout_s)
