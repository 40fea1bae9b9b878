"""What must hold after a schedule: every request's tokens, what is said of its cache, and what is counted."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fuzz.expected.answers import FP8_DTYPES, expected_of, kinds_of_marked
from tests.fuzz.expected.history import ENDED_BEFORE_ITS_GRAMMAR, History
from tests.fuzz.expected.said import check_counters, check_info
from tests.fuzz.inside.clean_up import FIRST_INDEX
from tests.fuzz.schedule import FuzzRequest, Schedule, rid_of
from tests.fuzz.server import ServerConfig
from tests.support.oracle.dense import SCORE_TOLERANCE
from tests.support.oracle.ties import num_equal, settled

# What an answer may be ended for once its request was preempted; the request can be sent again.
ENDED_AFTER_PREEMPTION = (
    "does not fit the KV pool",
    "Out of memory even after retracting all other requests",
)
ENDED_IN_THE_QUEUE = "Abort in waiting queue"
ENDED_AS_ITS_TURN_CAME = "Aborted"
LOGPROB_TOLERANCE = 1e-3
# Scores of beaconkv are softmax weights near 1, which in fp32 lie 6e-8 apart.
SCORE_TOLERANCES = {"beaconkv": 3e-7}
# In fp8 the last bit of fp32 may round a number to its neighbour, up to a quarter away, here and there one of a key.
FP8_TOLERANCES = {"logit_tolerance": 0.05, "score_tolerance": 3e-4}
FP8_LOGPROB_TOLERANCE = 0.1


@dataclass
class Verdict:
    """What was found: problems, one line each, and how many answers were compared with what."""

    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def check(schedule: Schedule, record: dict[str, Any]) -> Verdict:
    """Judge one schedule's record; under ``alone`` it has those of requests that were run once more, by index."""
    verdict = Verdict()
    for violation in record["violations"]:
        verdict.problems.append(f"{violation['violation']}: {violation}")
    if "outputs" not in record:
        return verdict
    for index in range(len(schedule.requests)):
        if rid_of(record["number"], index) not in record["outputs"]:
            verdict.problems.append(f"request {index} was never sent")
    if verdict.problems:
        return verdict
    history = History(schedule, record)
    verdict.problems += history.problems
    for index, request in enumerate(schedule.requests):
        problems = _check_request(schedule, index, request, record, history, verdict.counts)
        verdict.problems += [f"request {index}: {problem}" for problem in problems]
    verdict.problems += check_counters(record)
    if record["retractions"] and not _may_preempt(schedule):
        verdict.problems.append(f"requests ran out of memory that was reserved for them: {record['retractions']}")
    return verdict


def _may_preempt(schedule: Schedule) -> bool:
    """Return whether a request may lose its slots: what those under a policy need is reserved."""
    kinds = {event.kind for event in schedule.events}
    return (
        schedule.server.priority
        or bool(kinds & {"retract", "pause_retract"})
        or any(request.no_policy for request in schedule.requests)
    )


def _check_request(
    schedule: Schedule,
    index: int,
    request: FuzzRequest,
    record: dict[str, Any],
    history: History,
    counts: Counter[str],
) -> list[str]:
    rid = rid_of(record["number"], index)
    output, info = record["outputs"][rid], record["infos"].get(rid)
    retractions = record["retractions"].get(rid, [])
    end = output["finish_reason"]
    tokens = output["output_ids"]
    if end is None:
        return ["it got no answer"]
    if request.garbage:
        return [] if _is_refused(schedule, request, end) else [f"garbage was answered {end}"]
    problems = [
        f"after {place['outputs']} tokens it was{'' if place['copied'] else ' not'} copied to the host: {place}"
        for place in retractions
        if place["must_copy"] not in (None, place["copied"])
    ]
    counts.update(f"copied at a {place['cause']}" for place in retractions if place["copied"])
    is_cut = end["type"] == "abort"
    if is_cut:
        counts["aborted"] += 1
        if index in history.refused:
            counts["refused for a prefix"] += 1
        elif not _may_be_cut(schedule, request, end, retractions):
            problems.append(f"it was ended: {end}")
    elif end["type"] == "length" and len(tokens) != request.max_new_tokens:
        if history.may_be_short(index):
            request = replace(request, max_new_tokens=len(tokens))
        else:
            problems.append(f"it was cut at {len(tokens)} of {request.max_new_tokens} tokens")
    if info is not None and request.asks("create") and "kv_prefix" in info:
        counts["prefixes made"] += 1
        counts[f"prefixes made by {request.made['judge']}"] += 1
    counts["prefixes deleted"] += info is not None and request.asks("delete") and "kv_prefix" in info
    if index in history.refused - history.gone:
        return problems
    maker = history.maker_of(index)
    counts["behind a prefix"] += maker is not None and len(tokens) > 0
    counts["with an image"] += request.picture is not None and len(tokens) > 0
    is_stand_in = info is not None and follows_stand_in(request, maker, len(record["prompts"][rid]), info)
    if is_cut and (end.get("message") == ENDED_BEFORE_ITS_GRAMMAR or is_stand_in):
        counts["not compared"] += 1
    elif request.needs_itself_alone:
        alone = record.get("alone", {}).get(index)
        problems += _compare_alone(tokens, end, retractions, alone, counts)
    else:
        answer = output | {"info": info, "prompt": record["prompts"][rid], "prompt_len": record["prompt_lens"][rid]}
        problems += _compare_with_any(schedule.server, request, answer, retractions, history, maker, counts)
    if info is not None:
        problems += check_info(schedule.server, request, record, rid, info, history.held_by(index))
    else:
        problems.append("its answer does not say what happened to its cache")
    return problems


def follows_stand_in(request: FuzzRequest, maker: FuzzRequest | None, prompt_len: int, info: dict[str, Any]) -> bool:
    """Return whether an answer that was cut follows the prompt of one token that SGLang gives what is refused.

    What asks for a named prefix may be ended once it has been refused, before that is said.
    """
    is_behind_none = request.asks("use") and maker is None
    return request.prefix is not None and info.get("kv_prompt_tokens") == 1 and (is_behind_none or prompt_len > 1)


def _compare_with_any(
    server: ServerConfig,
    request: FuzzRequest,
    answer: dict[str, Any],
    retractions: list[Any],
    history: History,
    maker: FuzzRequest | None,
    counts: Counter[str],
) -> list[str]:
    """Compare an answer with the oracle's, for whatever named prefixes may have held of the pool.

    That decides whether a long prompt is compacted, and nothing else of an answer.
    """
    first: list[str] = []
    for held in history.may_be_held if request.kept_of_prompt(server) else (0,):
        counted: Counter[str] = Counter()
        pool = server.pool - held
        problems = compare_oracle(server, request, answer, retractions, counted, maker=maker, pool=pool)
        if not problems:
            counts += counted
            return []
        first = first or problems
    return first


def _is_refused(schedule: Schedule, request: FuzzRequest, end: dict[str, Any]) -> bool:
    """Return whether garbage was answered as it should be: it is refused when its turn comes, unless it was ended."""
    is_ended = request.abort_at is not None or request.abort_after is not None
    is_ended = is_ended or any(event.kind == "abort_all" for event in schedule.events)
    is_ended = is_ended and end.get("message") in (ENDED_IN_THE_QUEUE, ENDED_AS_ITS_TURN_CAME)
    return bool(end["type"] == "abort" and (end.get("status_code") == 400 or is_ended))


def _may_be_cut(schedule: Schedule, request: FuzzRequest, end: dict[str, Any], retractions: list[Any]) -> bool:
    message = str(end.get("message", ""))
    if any(text in message for text in ENDED_AFTER_PREEMPTION):
        return bool(retractions) or request.no_policy
    if request.abort_at is not None or request.abort_after is not None:
        return True
    # One whose prompt holds the answer of one that was ended before it said anything.
    return any(event.kind == "abort_all" for event in schedule.events)


def _compare_alone(
    tokens: list[int],
    end: dict[str, Any],
    retractions: list[Any],
    alone: dict[str, Any] | None,
    counts: Counter[str],
) -> list[str]:
    if alone is None or "outputs" not in alone or any(place["outputs"] > 0 for place in retractions):
        # Computed again with full attention, it may go another way, and the oracle does not know these settings.
        counts["not compared"] += 1
        return []
    # Behind it, in the order of their ids, only what was done to clean up; before it who made its prefix.
    right = alone["outputs"][max(rid for rid in alone["outputs"] if int(rid[-3:]) < FIRST_INDEX)]
    counts["compared with itself alone"] += 1
    expected = right["output_ids"]
    if end["type"] == "abort":
        expected = expected[: len(tokens)]
    elif end != right["finish_reason"]:
        return [f"it ended with {end} after {len(tokens)} tokens and alone with {right['finish_reason']}"]
    if tokens != expected:
        return [f"its tokens differ from those of itself alone: {tokens} instead of {expected}"]
    return []


def compare_oracle(
    server: ServerConfig,
    request: FuzzRequest,
    output: dict[str, Any],
    retractions: list[Any],
    counts: Counter[str],
    *,
    maker: FuzzRequest | None = None,
    pool: int | None = None,
) -> list[str]:
    """Return what differs between an answer and the dense oracle's; counts what was compared.

    Args:
        maker: Who made the named prefix that the request went on from.
        pool: What the pool has beside named prefixes, where that is not all.
    """
    tokens, end, info = output["output_ids"], output["finish_reason"], output["info"]
    if not tokens:
        return []
    is_cut = end["type"] == "abort"
    # Where it may have a head start, its own limit says whether it is compacted at all.
    limit = len(tokens) if is_cut and not server.stagger else request.max_new_tokens
    prompt, prompt_len = output["prompt"], output["prompt_len"]
    expected = expected_of(
        *(server, request, prompt, limit, retractions),
        guess=tokens,
        maker=maker,
        pool=pool,
        prompt_len=prompt_len,
    )
    counts["compared with the oracle"] += 1
    counts.update(kinds_of_marked(request, len(prompt) - prompt_len, retractions, expected))
    counts["compared after a preemption"] += bool(retractions)
    counts["compared after a restore"] += any(place["copied"] for place in retractions)
    counts["compactions compared"] += sum(c.num_outputs < len(tokens) for c in expected.compactions)
    is_fp8 = server.kv_dtype in FP8_DTYPES
    tolerances = {"score_tolerance": SCORE_TOLERANCES.get(server.policy, SCORE_TOLERANCE)}
    if num_equal(tokens, expected.output_ids) < min(len(tokens), len(expected.output_ids)):
        counts["near-ties"] += 1
        expected = settled(tokens, expected)
    certain = expected.num_certain_outputs(**(FP8_TOLERANCES if is_fp8 else tolerances))
    num_compared = min(len(tokens), len(expected.output_ids))
    right = expected.output_ids[: len(tokens)] if is_cut else expected.output_ids
    differing = num_equal(tokens, right)
    if certain <= differing < num_compared:
        return []
    if differing < num_compared:
        return [f"token {differing} is {tokens[differing]} instead of {right[differing]} ({retractions=})"]
    if len(tokens) != len(right):
        return [f"it has {len(tokens)} tokens instead of {len(right)}"]
    if request.logprobs:
        tolerance = FP8_LOGPROB_TOLERANCE if is_fp8 else LOGPROB_TOLERANCE
        pairs = zip(output["output_logprobs"], expected.logprobs[: len(tokens)], strict=True)
        differing = next((i for i, (own, sure) in enumerate(pairs) if abs(own - sure) > tolerance), len(tokens))
        if differing < min(certain, len(tokens)):
            return [f"log-probabilities {output['output_logprobs']} instead of {expected.logprobs}"]
        counts["near-ties"] += differing < len(tokens)
    is_whole = end["type"] == "length" and not retractions and info is not None
    if is_whole and info["kv_compactions"] != len(expected.compactions):
        return [f"it was compacted {info['kv_compactions']} times instead of {len(expected.compactions)}"]
    return []
