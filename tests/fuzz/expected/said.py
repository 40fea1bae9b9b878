"""What answers and counters say of a cache, compared with what the probe saw of it."""

from typing import Any

from tests.fuzz.schedule import FuzzRequest
from tests.fuzz.server import ServerConfig


def check_info(
    server: ServerConfig, request: FuzzRequest, record: dict[str, Any], rid: str, info: dict[str, Any], num_before: int
) -> list[str]:
    """Return what is wrong with what an answer says.

    Args:
        num_before: Slots of a named prefix that the request went on from.
    """
    if info.get("kv_policy") != ("none" if request.no_policy else server.policy):
        return [f"its answer says policy {info.get('kv_policy')!r}"]
    own = [event for event in record["compactions"] if event["rid"] == rid]
    evicted = sum(event["from_len"] - event["to_len"] for event in own)
    seen = num_before + len(record["prompts"][rid]) + max(len(record["outputs"][rid]["output_ids"]) - 1, 0)
    problems = []
    if not record["retractions"].get(rid):
        num_seen = _num_compactions(record, rid)
        if (info["kv_compactions"], info["kv_evicted_tokens"]) != (num_seen, evicted):
            problems.append(f"its answer says {info}, seen were {num_seen} compactions of {evicted} tokens")
        is_whole = record["outputs"][rid]["finish_reason"]["type"] != "abort"
        if is_whole and info["kv_resident_tokens"] + evicted != seen:
            problems.append(f"its answer says {info}, and {seen} tokens were seen")
        prompt_len = record["prompt_lens"][rid]
        is_plain = is_whole and request.prefix is None and not request.kept_of_prompt(server)
        if is_plain and info["kv_prompt_tokens"] != prompt_len:
            problems.append(f"its answer says {info}, and its prompt has {prompt_len} tokens")
    elif info["kv_compactions"] < len(own) or info["kv_evicted_tokens"] < evicted:
        problems.append(f"its answer says {info}, seen were {len(own)} compactions of {evicted} tokens")
    return problems


def _num_compactions(record: dict[str, Any], rid: str) -> int:
    """Return how many compactions of a request were seen; its prompt's and that of what came back may look like one."""
    own = [event for event in record["compactions"] if event["rid"] == rid]
    gone = own[0]["from_len"] - own[0]["to_len"] if own else 0
    of_prompt = own[0]["prompt_len"] - record["infos"][rid]["kv_prompt_tokens"] if own and rid in record["infos"] else 0
    return len(own) + (0 < of_prompt < gone)


def check_counters(record: dict[str, Any]) -> list[str]:
    """Return what is wrong with the counters of a server after a schedule."""
    stats, infos = record["stats"], record["infos"]
    problems = []
    totals = {
        "compactions": sum(info["kv_compactions"] for info in infos.values()),
        "evicted_tokens": sum(info["kv_evicted_tokens"] for info in infos.values()),
        "requests_compressed": sum(info["kv_compactions"] > 0 for info in infos.values()),
    }
    # The answers of those that waited when they ended say nothing of their caches.
    is_all = len(infos) == len(record["outputs"])
    for name, total in totals.items():
        if stats[name] != total if is_all else stats[name] < total:
            problems.append(f"{name} is {stats[name]}, and the answers add up to {total}")
    seen = sum(_num_compactions(record, rid) for rid in {event["rid"] for event in record["compactions"]})
    if stats["compactions"] < seen or (not record["retractions"] and stats["compactions"] != seen):
        problems.append(f"{stats['compactions']} compactions were counted and {seen} seen")
    restored = sum(place["copied"] for places in record["retractions"].values() for place in places)
    if stats["requests_restored"] > restored:
        problems.append(f"{stats['requests_restored']} restores were counted, {restored} requests were copied")
    return problems
