"""The requests of the oracle tests, and what the dense oracle answers to them (worked out once a process)."""

import hashlib
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest

from devtools.tiny_models import VOCAB_SIZE
from tests.support.harness.scheduler import Request, RunResult
from tests.support.oracle.decoder import load_model
from tests.support.oracle.dense import LOGIT_TOLERANCE, SCORE_TOLERANCE, DenseResult, dense_generate
from tests.support.oracle.masked_compact import MaskedResult, masked_compact
from tests.support.oracle.policy_scores import score_function
from tests.support.oracle.scores import ScoreFunction
from tests.support.oracle.ties import num_equal, settled

SHARED_PREFIX_LEN = 71
Result = TypeVar("Result", DenseResult, MaskedResult)


@dataclass(frozen=True)
class Setting:
    """Flags of the policy. With ``block`` its choice is made once for a request, in blocks of so many tokens."""

    budget: int
    buffer: int
    window: int = 8
    stagger: bool = False
    policy: str = "rkv"
    block: int | None = None
    prompt_budget: int = 0

    @property
    def flags(self) -> list[str]:
        return [
            *("--kv-policy", self.policy, "--kv-granularity", "head" if self.block is None else "request"),
            *("--rkv-budget", str(self.budget)),
            *("--rkv-buffer", str(self.buffer), "--rkv-window", str(self.window)),
            *["--rkv-stagger"] * self.stagger,
            *["--kv-prompt-budget", str(self.prompt_budget)] * (self.prompt_budget > 0),
        ]

    @property
    def score(self) -> ScoreFunction:
        """The oracle's score of the policy."""
        is_drawn_at_once = self.block is not None and self.policy == "random_attention"
        return score_function(self.policy, **({"whole_request": True} if is_drawn_at_once else {}))

    def early(self, prompt: Sequence[int], outputs: Sequence[int]) -> int:
        """Return how early a request's first compaction is with the flag, as its definition says it."""
        ids = [*prompt, *outputs[:16]]
        digest = hashlib.blake2b(struct.pack(f"<{len(ids)}q", *ids), digest_size=8).digest()
        (number,) = struct.unpack("<Q", digest)
        # It leaves one token to evict, and 16 to decide it.
        step = self.block or 1
        choices = [phi for phi in range(0, self.buffer, step) if phi == 0 or self.budget + self.buffer - phi >= 16]
        return choices[number % len(choices)]


def random_ids(rng: random.Random, length: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Return token ids without the special ones."""
    return [rng.randrange(3, vocab_size) for _ in range(length)]


@cache
def six_prompts(seed: int = 5) -> tuple[tuple[int, ...], ...]:
    """Return six prompts of mixed lengths, the first four of which share a prefix of 71 tokens."""
    rng = random.Random(seed)
    shared = random_ids(rng, SHARED_PREFIX_LEN)
    prompts = [shared + random_ids(rng, length) for length in (3, 9, 26, 60)]
    prompts += [random_ids(rng, length) for length in (5, 47)]
    return tuple(tuple(prompt) for prompt in prompts)


_answers: dict[tuple[Path, tuple[int, ...], int, Setting], DenseResult] = {}


def oracle(
    model: Path, prompt: tuple[int, ...], max_new_tokens: int, setting: Setting, guess: Sequence[int] = ()
) -> DenseResult:
    """Return what a request must answer; ``guess``, such as what it did answer, hastens it, whatever it says."""
    asked = (model, prompt, max_new_tokens, setting)
    if asked not in _answers:
        _answers[asked] = dense_generate(
            model,
            prompt,
            max_new_tokens,
            budget=setting.budget,
            buffer=setting.buffer,
            window=setting.window,
            early=setting.early if setting.stagger else None,
            guessed_output_ids=guess,
            score=setting.score,
            block=setting.block,
            prompt_budget=setting.prompt_budget or None,
        )
    return _answers[asked]


def masked_oracle(
    model: Any, prompt: Sequence[int], setting: Setting, found: Sequence[int], **options: Any
) -> MaskedResult:
    """Return what a request of any model must answer, in as many tokens as were ``found``, which hasten it.

    Args:
        model: A transformers model, or the folder of one.
    """
    return masked_compact(
        load_model(model) if isinstance(model, Path) else model,
        prompt,
        len(found),
        **{
            "budget": setting.budget,
            "buffer": setting.buffer,
            "window": setting.window,
            "score": setting.score,
            "block": setting.block,
            "guessed_output_ids": found,
            **options,
        },
    )


def greedy(prompt: tuple[int, ...] | list[int], max_new_tokens: int, **fields: object) -> Request:
    """Return a request that decodes exactly that many tokens, greedily."""
    sampling_params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return Request(input_ids=list(prompt), sampling_params=sampling_params, **fields)  # type: ignore[arg-type]


def assert_same_tokens(found: list[int], expected: Result, name: str) -> Result:
    """Assert equal answers. Where a near-tie of scores decides, the oracle is asked what follows from the other choice.

    Returns what it says then, log-probabilities and all. Where a near-tie of scores that is closer still does not
    explain it, or the logits of the first token that differs are a near-tie, which inputs are drawn shows nothing. Then
    the test is skipped, and says so.
    """
    assert len(found) == len(expected.output_ids), f"{name}: {len(found)} tokens instead of {len(expected.output_ids)}"
    expected = settled(found, expected)
    i = num_equal(found, expected.output_ids)
    if i == len(found):
        return expected
    gap, right = expected.logit_gaps[i], expected.output_ids[i]
    margins = [margin for num_outputs, margin in expected.cuts if num_outputs <= i]
    if gap < LOGIT_TOLERANCE or any(0 < margin < SCORE_TOLERANCE for margin in margins):
        pytest.skip(f"{name}: a near-tie decides token {i}: logit gap {gap}, score margins {margins}")
    raise AssertionError(
        f"{name}: token {i} is {found[i]} instead of {right}; logit gap there {gap:.2e}, "
        f"smallest score margins of the compactions before: {[f'{margin:.1e}' for margin in margins]}"
    )


def retracting(interval: int) -> dict[str, str]:
    """Return the environment in which SGLang retracts a request every so many forward passes."""
    return {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": str(interval)}


def outputs_at_retractions(result: RunResult, rid: str) -> list[int]:
    """Return after how many output tokens a request was prefilled again, each time."""
    return [output_len for output_len, is_restored in _comebacks(result, rid) if not is_restored]


def outputs_at_restores(result: RunResult, rid: str) -> list[int]:
    """Return after how many output tokens a request came back with what it had kept, each time."""
    return [output_len for output_len, is_restored in _comebacks(result, rid) if is_restored]


def _comebacks(result: RunResult, rid: str) -> list[tuple[int, bool]]:
    """Return, of each time that a request came back after a retraction, its output tokens and whether it kept its KV.

    One that is prefilled again holds all that it has seen before it generates another token.
    """
    first: dict[int, int] = {}
    held: dict[int, int] = {}
    for entry in result.probe.per_request(rid):
        count = entry["retractions"]
        output_len = first.setdefault(count, entry["output_len"])
        if entry["output_len"] == output_len:
            held[count] = max(held.get(count, 0), entry["allocated_len"] - entry["prompt_len"])
    return [(first[count], held[count] < first[count]) for count in sorted(first) if count > 0]
