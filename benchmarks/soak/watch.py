"""One look at a server: the memory of its processes, its pool, its metrics."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import psutil

from devtools.launch import Server
from rkv_sglang.client.http import open_url

# Processes by what their titles contain; the first that fits.
ROLES = ("scheduler", "detokenizer")
MAIN, OTHER = "main", "other"
SERIES = {
    "running": "sglang:num_running_reqs",
    "queued": "sglang:num_queue_reqs",
    "pool_tokens": "sglang:num_used_tokens",
    "retractions": "sglang:num_retracted_requests_total",
    "compactions": "rkv:compactions_total",
    "restored": "rkv:requests_restored_total",
}
# Without files, whose share falls when another process maps the same library. Linux older than 5.4 tells only the sum.
_OWN = re.compile(r"^(?:Pss_Anon|Pss_Shmem|SwapPss):\s+(\d+) kB$", re.MULTILINE)
_ALL = re.compile(r"^Pss:\s+(\d+) kB$", re.MULTILINE)


def memory_mib(server: Server) -> dict[str, float]:
    """Return the proportional set size by role, MiB, without files: pages that several processes share count once."""
    found = dict.fromkeys((MAIN, *ROLES, OTHER), 0.0)
    main = psutil.Process(server.process.pid)
    for process in [main, *main.children(recursive=True)]:
        # It may end meanwhile.
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            role = MAIN if process.pid == main.pid else _role(" ".join(process.cmdline()))
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            found[role] += sum(map(int, (_OWN if "Pss_Anon" in text else _ALL).findall(text))) / 1024
    return found


def _role(title: str) -> str:
    return next((role for role in ROLES if role in title), OTHER)


def metrics(server: Server) -> dict[str, float]:
    """Return the series of ``SERIES``, summed over their labels; 0 for one that has not come yet."""
    with open_url(server.url + "/metrics", timeout_s=60) as response:
        text = response.read().decode()
    return {
        name: sum(map(float, re.findall(rf"^{re.escape(series)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)))
        for name, series in SERIES.items()
    }
