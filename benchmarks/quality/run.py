"""What real servers are asked, and the results as they are kept: one ``.npz`` a server and part."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.asking import ask_side_by_side
from benchmarks.common.schema import run_info
from benchmarks.common.settings import policy_setting
from benchmarks.common.statistics import compactions_before
from benchmarks.quality.forcing import ForcingProcessor, forcing_params, read_record
from benchmarks.quality.texts import RecallText
from devtools.launch import Server, ServerError, has_gpu, importing_from, launched_server
from rkv_sglang.config import NO_POLICY

# Stands for the uncompressed cache where a budget is expected.
UNCOMPRESSED = 0
# So many prompts are also forced without compression on every server, against the reference's distributions.
NUM_CHECKED = 4
# What batches of other sizes may change. The GPU's is a guess: nothing has been run there yet.
CHECK_KL, CHECK_AGREEMENT = (1e-2, 0.97) if has_gpu() else (1e-5, 0.999)
# Tokens between two events of a stream: enough for a progress bar.
STREAM_INTERVAL = 16
BUFFER = 16
PREFILL_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is asked of every server. ``folder`` keeps the results and the reference's distributions.

    The reference is the greedy, uncompressed answer to every prompt, which only passes over ``end_ids``.
    """

    model: str
    folder: Path
    prompts: list[list[int]]
    recall_prompt: list[int]
    recall_texts: list[RecallText]
    end_ids: list[int]
    num_tokens: int
    budgets: tuple[int, ...]
    batch_size: int
    num_servers: int = 1
    flags: tuple[str, ...] = ()

    @property
    def checked(self) -> range:
        return range(min(NUM_CHECKED, len(self.prompts)))

    def logprobs(self, prompt: int) -> Path:
        """File of the reference's distributions along its answer, ``[num_tokens, vocab_size]`` float32."""
        return self.folder / "logprobs" / f"{prompt}.f32"

    def result(self, policy: str, part: str) -> Path:
        """File of what ``run_part`` found: records ``[runs, num_tokens]``, and prompt and budget of every run."""
        return self.folder / f"{policy}-{part}.npz"


def buffer_of(budget: int) -> int:
    """Return the buffer that goes with a budget: the same for all, so that they are compacted as often."""
    return BUFFER if budget != UNCOMPRESSED else 0


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: a prompt by number and by ids, its budget and its script for the logit processor."""

    prompt: int
    input_ids: list[int]
    budget: int
    forcing: dict[str, Any]


@contextlib.contextmanager
def policy_server(study: Study, policy: str) -> Iterator[Server]:
    """Run the server of one policy; it serves all budgets, and requests without compression."""
    longest = max(len(ids) for ids in [*study.prompts, study.recall_prompt])
    # Every request uncompressed and as many again in the radix cache: none may be retracted.
    pool = 2 * study.batch_size * (longest + study.num_tokens + 64)
    most = max(study.budgets)
    flags = [
        *policy_setting(policy, most, buffer_of(most)).flags,
        "--enable-custom-logit-processor",
        # SGLang sets memory aside for a prefill step of this size.
        *("--chunked-prefill-size", "-1", "--max-prefill-tokens", str(max(longest, PREFILL_TOKENS))),
        *("--max-running-requests", str(study.batch_size), "--max-total-tokens", str(pool)),
        *("--stream-interval", str(STREAM_INTERVAL), "--decode-log-interval", "100"),
        *study.flags,
    ]
    log_path = Path(".cache/logs") / f"quality-{policy}.log"
    # The server's processes find the processor by its module's name.
    environment = importing_from(Path(__file__).resolve().parents[2])
    # More threads than cores that are free wait for each other, so whoever set a number knows better.
    if not has_gpu() and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // study.num_servers))
    with launched_server(study.model, *flags, log_path=log_path, environment=environment) as server:
        yield server


def _ask(server: Server, ask: Ask, num_tokens: int, progress: tqdm) -> list[int]:
    wanted: dict[str, Any] = {"kv_policy": NO_POLICY}
    expected = 0
    if ask.budget != UNCOMPRESSED:
        wanted = {"kv_budget": ask.budget, "kv_buffer": buffer_of(ask.budget)}
        expected = compactions_before(num_tokens - 1, ask.budget, buffer_of(ask.budget))
    payload: dict[str, Any] = {
        "input_ids": ask.input_ids,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": num_tokens,
            "ignore_eos": True,
            "custom_params": {**wanted, **ask.forcing},
        },
        "custom_logit_processor": ForcingProcessor.to_str(),
    }
    output_ids: list[int] = []
    meta: dict[str, Any] = {}
    for event in server.stream_generate(payload, timeout_s=3600):
        progress.update(len(event["output_ids"]) - len(output_ids))
        output_ids, meta = event["output_ids"], event["meta_info"]
    found = meta.get("kv_compactions")
    if len(output_ids) != num_tokens or found != expected:
        raise ServerError(
            f"an answer has {len(output_ids)} tokens and {found} compactions instead of {num_tokens} and {expected}; "
            f"the server's log: {server.log_path}"
        )
    return output_ids


def ask_all(server: Server, label: str, asks: Sequence[Ask], study: Study) -> list[list[int]]:
    """Return the output ids of every request, in order; ``batch_size`` of them are under way at a time.

    Raises:
        ServerError: An answer failed, is too short, or was not compacted as often as it should.
    """
    answers: list[list[int]] = [[]] * len(asks)
    num_tokens = study.num_tokens
    # In a file every refresh is one more line, so there they are rare.
    refresh_s = 1 if sys.stderr.isatty() else 30
    with tqdm(total=len(asks) * num_tokens, desc=label, unit="tok", mininterval=refresh_s, ncols=90) as progress:
        # Whatever is still under way after an error ends with the server.
        for i, answer in ask_side_by_side(
            lambda i: _ask(server, asks[i], num_tokens, progress), range(len(asks)), study.batch_size
        ):
            answers[i] = answer
    return answers


def run_part(server: Server, policy: str, part: str, study: Study) -> None:
    """Ask everything of one part and keep the result. The policy ``none`` is the uncompressed side, on any server.

    Raises:
        ServerError: A request failed.
        ValueError: A record does not fit its answer, or an uncompressed request differs from the reference.
    """
    records = study.folder / "records" / f"{policy}-{part}"
    for folder in (records, study.folder / "logprobs"):
        folder.mkdir(parents=True, exist_ok=True)
    for old in records.iterdir():
        old.unlink()
    asks = _ASKS[part](study, policy, records)
    start = time.perf_counter()
    answers = ask_all(server, f"{policy} {part}", asks, study)
    seconds = time.perf_counter() - start
    record = np.stack([read_record(_record(records, i), answers[i]) for i in range(len(asks))])
    budget = np.array([ask.budget for ask in asks])
    if part == "forced":
        check_uncompressed(policy, record[budget == UNCOMPRESSED])
    made = {**run_info(), "seconds": round(seconds, 1), "tokens_per_s": round(record.size / seconds, 1)}
    path = study.result(policy, part)
    # A name that no later run takes for a finished part.
    unfinished = path.with_suffix(".part.npz")
    np.savez_compressed(
        unfinished, made=json.dumps(made), prompt=[ask.prompt for ask in asks], budget=budget, record=record
    )
    unfinished.rename(path)


def check_uncompressed(policy: str, record: np.ndarray) -> None:
    """Raise ``ValueError`` unless the uncompressed requests of a server said what the reference said.

    Args:
        record: Of these requests, forced along the reference, ``[runs, num_tokens]`` of ``RECORD``.
    """
    kl = np.abs(record["kl"]).max()
    agreement = (record["top"] == record["reference_top"]).mean()
    if not (kl <= CHECK_KL and agreement >= CHECK_AGREEMENT):
        raise ValueError(
            f"the server of {policy} answers uncompressed requests unlike the reference: top-1 agreement "
            f"{agreement:.4f}, KL up to {kl:.1e}; allowed are {CHECK_AGREEMENT} and {CHECK_KL:.0e}, so no figure here "
            "can be trusted"
        )


def reference_tokens(study: Study) -> list[list[int]]:
    """Return the reference's answer to every prompt."""
    record = np.load(study.result(NO_POLICY, "reference"))["record"]
    return [[int(token) for token in row] for row in record["token"]]


def _record(records: Path, i: int) -> Path:
    return records / f"{i}.npy"


def _ask_reference(study: Study, policy: str, records: Path) -> list[Ask]:
    """The uncompressed answers; along the kept ones, if only their distributions were lost."""
    kept = study.result(NO_POLICY, "reference").exists()
    tokens = reference_tokens(study) if kept else [[]] * len(study.prompts)
    return [
        Ask(
            prompt=i,
            input_ids=prompt,
            budget=UNCOMPRESSED,
            forcing=forcing_params(
                study.num_tokens,
                _record(records, i),
                tokens=tokens[i],
                banned=study.end_ids,
                write_logprobs=study.logprobs(i),
            ),
        )
        for i, prompt in enumerate(study.prompts)
    ]


def _ask_forced(study: Study, policy: str, records: Path) -> list[Ask]:
    tokens = reference_tokens(study)
    # All budgets of a prompt side by side: they share its prefill and read the same distributions.
    pairs = [(i, UNCOMPRESSED) for i in study.checked]
    pairs += [(i, budget) for i in range(len(study.prompts)) for budget in study.budgets]
    return [
        Ask(
            prompt=i,
            input_ids=study.prompts[i],
            budget=budget,
            forcing=forcing_params(
                study.num_tokens, _record(records, place), tokens=tokens[i], read_logprobs=study.logprobs(i)
            ),
        )
        for place, (i, budget) in enumerate(pairs)
    ]


def _at_every_budget(
    study: Study, policy: str, records: Path, prompts: Sequence[list[int]], scripts: Sequence[dict[str, Any]]
) -> list[Ask]:
    """Every prompt with its own script, at every budget of the policy."""
    budgets = (UNCOMPRESSED,) if policy == NO_POLICY else study.budgets
    pairs = [(i, budget) for i in range(len(prompts)) for budget in budgets]
    return [
        Ask(
            prompt=i,
            input_ids=prompts[i],
            budget=budget,
            forcing=forcing_params(study.num_tokens, _record(records, place), **scripts[i]),
        )
        for place, (i, budget) in enumerate(pairs)
    ]


def _ask_free(study: Study, policy: str, records: Path) -> list[Ask]:
    scripts = [{"banned": study.end_ids}] * len(study.prompts)
    return _at_every_budget(study, policy, records, study.prompts, scripts)


def _ask_recall(study: Study, policy: str, records: Path) -> list[Ask]:
    scripts = [{"tokens": text.tokens} for text in study.recall_texts]
    return _at_every_budget(study, policy, records, [study.recall_prompt] * len(scripts), scripts)


_ASKS = {"reference": _ask_reference, "forced": _ask_forced, "free": _ask_free, "recall": _ask_recall}
