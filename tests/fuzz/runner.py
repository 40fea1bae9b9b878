"""Runs schedules in scheduler processes, one process for those that share a server, and returns what came of each."""

import atexit
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.schedule import Schedule
from tests.fuzz.server import THOUGHTS, ServerConfig
from tests.support.harness.environment import child_environment, device_flags, with_defaults
from tests.support.harness.scheduler import run_job

# For the start of a scheduler, and for each schedule; a machine with other work is many times slower than an idle one.
START_TIMEOUT_S, SCHEDULE_TIMEOUT_S = 240.0, 30.0
LOG_LINES = 12
# Of all tiny models that the oracle knows.
ROPE_THETA = 10000.0
Record = dict[str, Any]


def run_schedules(schedules: Sequence[Schedule], *, env: dict[str, str] | None = None) -> list[Record]:
    """Run schedules and return a record for each, in order; one whose scheduler died has the violation ``died``."""
    records: list[Record] = []
    for _, group in itertools.groupby(enumerate(schedules), key=lambda pair: pair[1].server):
        members = [schedule for _, schedule in group]
        while members:
            done = _run_process(members, env or {})
            records += done
            members = members[len(done) :]
    return records


def policy_parameters(server: ServerConfig) -> dict[str, Any]:
    """Return what the oracle's score of a server's policy must be told of the model."""
    if server.policy == "triattention":
        return {"statistics": _statistics_of(server), "theta": ROPE_THETA}
    if server.policy == "thinkv":
        return {**THOUGHTS, "buffer": server.buffer}
    return {"theta": ROPE_THETA} if server.policy == "beaconkv" else {}


@cache
def _cache_home(model: str) -> Path:
    """Return a folder for what servers of a model keep beyond their end: statistics of its queries, measured once."""
    folder = Path(tempfile.mkdtemp(prefix=f"rkv-fuzz-{model}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _statistics_of(server: ServerConfig) -> Path:
    """Return the file of what a server's start measured of its model's queries; of several ranks put together."""
    home, num_ranks = _cache_home(server.model), server.tp_size // server.attn_dp_size
    paths = [
        path
        for rank in range(num_ranks)
        for path in home.glob(f"rkv_sglang/query_statistics/*-{rank}of{num_ranks}.safetensors")
    ]
    assert len(paths) == num_ranks, paths
    if num_ranks == 1:
        return paths[0]
    whole, parts = home / f"of-{num_ranks}-ranks.safetensors", [load_file(path) for path in paths]
    # Each rank has heads of its own.
    save_file({name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}, whole)
    return whole


def _run_process(schedules: list[Schedule], env: dict[str, str]) -> list[Record]:
    """Run schedules of one server in one process; return at least one record, fewer than asked for if it died."""
    server = schedules[0].server
    folder = Path(tempfile.mkdtemp(prefix="rkv-fuzz-"))
    binding = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(server.tp_size)))} if server.tp_size > 1 else {}
    variables = {"RKV_SGLANG_VERIFY": "1", "XDG_CACHE_HOME": str(_cache_home(server.model))}
    if server.block is not None:
        variables["RKV_PROBE_MOVES_NOTHING"] = "1"
    if server.serves_prefixes:
        # How many exactly, the driver says.
        variables["RKV_PROBE_MAX_LOCKED"] = str(server.pool)
    job = {
        "flags": with_defaults(server.flags, ["--random-seed", "1", *device_flags()]),
        "env": child_environment(folder / "probe.jsonl", {**variables, **binding, **server.env, **env}),
        "folder": str(folder),
        "driver": "tests.fuzz.inside.driver:register",
        "schedules": schedules,
    }
    try:
        answer = run_job(job, START_TIMEOUT_S + SCHEDULE_TIMEOUT_S * len(schedules))
        log_path = folder / "log"
        log = log_path.read_text(errors="replace") if log_path.exists() else ""
        lines = list(_read(folder / "records"))
        others = [line for path in folder.glob("records.rank*") for line in _read(path)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    records = [line for line in lines if "number" in line]
    for line in lines:
        if "of" in line:
            records[line["of"]].setdefault("alone", {})[line["index"]] = line
            records[line["of"]]["violations"] += line["violations"]
    for line in others:
        if line.get("number", len(records)) < len(records):
            _add_rank(records[line["number"]], line)
    if answer["status"] == "ok" and len(records) == len(schedules):
        return records
    has_hung = bool(records) and any(found.get("violation") == "hang" for found in records[-1]["violations"])
    if has_hung:
        return records
    started = sum("started" in line for line in lines)
    if answer["status"] == "refused" or not started:
        raise RuntimeError(f"no scheduler started with {' '.join(server.flags)}:\n{log[-4000:]}")
    died = {"violation": "died", "status": answer["status"], "log": _tail(log)}
    if started == len(records):
        # After its last record: in a run of one of its requests alone, or while it stopped.
        records[-1]["violations"].append(died)
        return records
    return [*records, {"number": started - 1, "violations": [died]}]


def _add_rank(record: Record, other: Record) -> None:
    """Add what another rank wrote of a schedule: violations, and all else where it had requests of its own."""
    record["violations"] += other["violations"]
    if "outputs" not in other or "outputs" not in record:
        return
    for name in ("outputs", "prompts", "prompt_lens", "infos", "retractions", "sent", "ended"):
        record[name] |= other[name]
    record["compactions"] += other["compactions"]
    record["stats"] = {name: value + other["stats"][name] for name, value in record["stats"].items()}
    for name in ("passes", "max_running", "seconds"):
        record[name] = max(record[name], other[name])


def _read(path: Path) -> Iterable[Record]:
    text = path.read_text() if path.exists() else ""
    return (json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))


def _tail(log: str) -> list[str]:
    """Return the lines of a log that tell why a process ended: the end of its last traceback."""
    lines = [line for line in log.splitlines() if line.strip()]
    start = max((i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line), default=None)
    if start is None:
        return lines[-LOG_LINES:]
    # What was raised stands in the first line that is not indented.
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines) - 1)
    return [lines[end], *lines[max(start, end - LOG_LINES) : end]]
