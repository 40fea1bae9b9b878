"""What the tests of named prefixes share: a tiny model, a document with its task, and the requests about them."""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import Setting, greedy, random_ids
from tests.support.harness.scheduler import Output, Request
from tests.support.oracle.dense import DenseResult, Prefix, dense_generate

MODEL = tiny_model_path("llama-gqa")
FLAGS = ["--model-path", str(MODEL)]
LENGTH, BUDGET = 90, 32
NUM_TOKENS = 60
# What four of the prompts begin with.
SHARED_LEN = 37
NAME = "a handbook"
# Between a document and its repeat.
INSTRUCTION = [9, 8, 7, 6, 5]
CREATE: dict[str, Any] = {"create": NAME, "length": LENGTH, "budget": BUDGET}


def asking(value: Any, prompt: list[int], num_tokens: int = 1, **fields: Any) -> Request:
    request = greedy(prompt, num_tokens, **fields)
    request.sampling_params["custom_params"] = {"kv_prefix": value}
    return request


def behind(judge: str, length: int = LENGTH) -> list[int]:
    """Return what comes behind the first ``length`` tokens of the document, which it judges."""
    document, task, _ = texts()
    return [*INSTRUCTION, *document[:length]] if judge == "repeat" else task


def answer_behind(
    prefix: Prefix,
    setting: Setting,
    prompt: Sequence[int],
    found: Sequence[int],
    *,
    model: Path = MODEL,
    **options: Any,
) -> DenseResult:
    """Return what a request must answer behind a prefix, in as many tokens as were ``found``, which hasten it."""
    return dense_generate(
        model,
        prompt,
        len(found),
        budget=setting.budget,
        buffer=setting.buffer,
        window=setting.window,
        block=setting.block,
        score=setting.score,
        prefix=prefix,
        guessed_output_ids=found,
        **options,
    )


@cache
def texts(seed: int = 7) -> tuple[list[int], list[int], list[list[int]]]:
    """Return a document, a task, and six prompts, of which four begin alike."""
    rng = random.Random(seed)
    shared = random_ids(rng, SHARED_LEN)
    prompts = [[*shared, *random_ids(rng, length)] for length in (3, 9, 26, 1)]
    prompts += [random_ids(rng, length) for length in (1, 47)]
    return random_ids(rng, LENGTH), random_ids(rng, 21), prompts


def refusal_of(output: Output) -> str:
    assert output.finish_reason["type"] == "abort" and output.finish_reason["status_code"] == 400, output
    message = output.finish_reason["message"]
    assert "\n" not in message and "kv_prefix" not in output.info
    return str(message)
