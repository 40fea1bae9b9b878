"""From what ``run`` kept to the rows of its tables. One value a prompt goes into every interval."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np

from benchmarks.common.schema import Row, Value
from benchmarks.common.statistics import Estimate, compactions_before, mean_interval
from benchmarks.quality.run import UNCOMPRESSED, Study, buffer_of, reference_tokens
from benchmarks.quality.statistics import (
    answer_length,
    first_compacted_step,
    first_divergence,
    interval_bins,
    is_fresh,
    repetition_rate,
)
from benchmarks.quality.texts import Fact
from rkv_sglang.config import NO_POLICY

POSITIONS_A_BIN = 64
CONTROL = "random"
_MISSING = Estimate(np.nan, np.nan, np.nan)


def forced_rows(study: Study, policies: Sequence[str]) -> list[Row]:
    """Return the rows of ``QUALITY_FORCED``: every server's self-check, then its budgets."""
    fresh = np.array([is_fresh(tokens) for tokens in reference_tokens(study)])
    rows: list[Row] = []
    for policy in policies:
        for budget in (UNCOMPRESSED, *study.budgets):
            prompts, record = runs_of(study, policy, "forced", budget)
            for span, mask in _spans(budget, fresh[prompts]).items():
                if not mask.any():
                    continue
                row: Row = {"server": policy, **_policy(policy, budget), "span": span}
                row |= {"prompts": int(mask.any(axis=1).sum()), "steps": int(mask.sum())}
                row |= {**_against_full(record, mask), "kl_max": _round(record["kl"][mask].max())}
                rows.append(row | _estimate("kl_less_random", _kl_less_control(study, policies, budget, record, mask)))
    return rows


def _spans(budget: int, fresh: np.ndarray) -> dict[str, np.ndarray]:
    """Return masks of steps, ``[runs, num_tokens]``, by name."""
    everything = np.ones_like(fresh)
    if budget == UNCOMPRESSED:
        return {"all": everything}
    compacted = everything.copy()
    compacted[:, : first_compacted_step(budget, buffer_of(budget))] = False
    return {"all": everything, "compacted": compacted, "fresh": compacted & fresh}


def _kl_less_control(
    study: Study, policies: Sequence[str], budget: int, record: np.ndarray, mask: np.ndarray
) -> Estimate:
    if budget == UNCOMPRESSED or CONTROL not in policies:
        return _MISSING
    _, control = runs_of(study, CONTROL, "forced", budget)
    return mean_interval(prompt_means(record["kl"] - control["kl"], mask))


def position_rows(study: Study, policies: Sequence[str]) -> list[Row]:
    """Return the rows of ``QUALITY_POSITION``."""
    rows: list[Row] = []
    for policy in policies:
        for budget in study.budgets:
            _, record = runs_of(study, policy, "forced", budget)
            for start in range(0, study.num_tokens, POSITIONS_A_BIN):
                mask = np.zeros(record.shape, bool)
                mask[:, start : start + POSITIONS_A_BIN] = True
                last = min(start + POSITIONS_A_BIN, study.num_tokens) - 1
                row: Row = {**_policy(policy, budget), "position": start, "position_end": last}
                row |= {"compactions": compactions_before(last, budget, buffer_of(budget)), "prompts": len(record)}
                rows.append(row | _against_full(record, mask))
    return rows


def free_rows(study: Study, policies: Sequence[str]) -> list[Row]:
    """Return the rows of ``QUALITY_FREE``, the reference's first."""
    references = reference_tokens(study)
    rows: list[Row] = []
    for policy, budget in _settings(study, policies):
        prompts, record = runs_of(study, policy, "reference" if policy == NO_POLICY else "free", budget)
        tokens = [run.tolist() for run in record["token"]]
        starts = [first_divergence(run, references[prompt]) for run, prompt in zip(tokens, prompts, strict=True)]
        row: Row = {**_policy(policy, budget), "prompts": len(record), "num_tokens": study.num_tokens}
        rows.append(
            row
            | _estimate("length", mean_interval([answer_length(run.tolist(), study.end_ids) for run in record["top"]]))
            | _estimate("repetition", mean_interval([repetition_rate(run) for run in tokens]))
            | _estimate("divergence", mean_interval(starts))
            | _estimate("diverged", mean_interval([start < study.num_tokens for start in starts]))
        )
    return rows


def recall_rows(study: Study, policies: Sequence[str]) -> list[Row]:
    """Return the rows of ``QUALITY_RECALL``, the full cache's first, where no fact has an age."""
    _, full = runs_of(study, NO_POLICY, "recall", UNCOMPRESSED)
    rows: list[Row] = []
    for policy, budget in _settings(study, policies):
        texts, record = runs_of(study, policy, "recall", budget)
        facts = [
            (
                _age(fact, budget),
                text,
                _exact(run, fact),
                _nll(run, fact),
                _exact(full[text], fact),
                _nll(full[text], fact),
            )
            for run, text in zip(record, texts, strict=True)
            for fact in study.recall_texts[text].facts
        ]
        for least, most in interval_bins(max(fact[0] for fact in facts)):
            chosen = [fact[1:] for fact in facts if least <= fact[0] <= most]
            if not chosen:
                continue
            text, exact, nll, exact_full, nll_full = map(np.array, zip(*chosen, strict=True))
            row: Row = {**_policy(policy, budget), "age": least, "age_end": most}
            row |= {"prompts": len(set(text.tolist())), "facts": len(chosen)}
            rows.append(
                row
                | _estimate("exact", mean_interval(group_means(exact, text)))
                | _estimate("nll", mean_interval(group_means(nll, text)))
                | {"exact_full": _round(mean_interval(group_means(exact_full, text)).mean)}
                | _estimate("nll_diff", mean_interval(group_means(nll - nll_full, text)))
            )
    return rows


def _age(fact: Fact, budget: int) -> int:
    """Return how many compactions lie between the pass that caches a fact's last token and the one that recalls it."""
    if budget == UNCOMPRESSED:
        return 0
    buffer = buffer_of(budget)
    return compactions_before(fact.asked[0], budget, buffer) - compactions_before(fact.written + 1, budget, buffer)


def _exact(run: np.ndarray, fact: Fact) -> float:
    asked = run[list(fact.asked)]
    return float((asked["top"] == asked["token"]).all())


def _nll(run: np.ndarray, fact: Fact) -> float:
    return float(run["nll"][list(fact.asked)].mean())


def runs_of(study: Study, policy: str, part: str, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts ``[runs]`` and records ``[runs, num_tokens]`` of one budget, in the order of the prompts."""
    with np.load(study.result(policy, part)) as kept:
        chosen = kept["budget"] == budget
        prompts, record = kept["prompt"][chosen], kept["record"][chosen]
    order = np.argsort(prompts)
    return prompts[order], record[order]


def prompt_means(values: np.ndarray, mask: np.ndarray) -> list[float]:
    """Return each row's mean over its masked steps, ``[runs, num_tokens]`` to one value a row that has such steps."""
    return [float(row[chosen].mean()) for row, chosen in zip(values, mask, strict=True) if chosen.any()]


def group_means(values: np.ndarray, groups: np.ndarray) -> list[float]:
    """Return the mean of the values of each group."""
    return [float(values[groups == group].mean()) for group in np.unique(groups)]


def _settings(study: Study, policies: Iterable[str]) -> list[tuple[str, int]]:
    return [(NO_POLICY, UNCOMPRESSED), *((policy, budget) for policy in policies for budget in study.budgets)]


def _policy(policy: str, budget: int) -> Row:
    return {"policy": policy if budget else NO_POLICY, "budget": budget, "buffer": buffer_of(budget)}


def _against_full(record: np.ndarray, mask: np.ndarray) -> Row:
    values = {
        "agreement": (record["top"] == record["reference_top"]).astype(float),
        "kl": record["kl"],
        "nll_diff": record["nll"] - record["reference_nll"],
    }
    row: Row = {}
    for name, value in values.items():
        row |= _estimate(name, mean_interval(prompt_means(value, mask)))
    return row


def _estimate(name: str, estimate: Estimate) -> Row:
    ends: dict[str, Value] = {f"{name}_{end}": _round(value) for end, value in asdict(estimate).items()}
    ends[name] = ends.pop(f"{name}_mean")
    return ends


def _round(value: float) -> float:
    return float(f"{value:.6g}")
