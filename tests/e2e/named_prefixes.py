"""What the tests of named prefixes share: a tiny model, a document with its task, and the requests about them."""

import random
from functools import cache
from typing import Any

from devtools.tiny_models import tiny_model_path
from tests.e2e.workload import greedy, random_ids
from tests.support.harness.scheduler import Output, Request

MODEL = tiny_model_path("llama-gqa")
FLAGS = ["--model-path", str(MODEL)]
LENGTH, BUDGET = 90, 32
NUM_TOKENS = 60
NAME = "a handbook"
CREATE: dict[str, Any] = {"create": NAME, "length": LENGTH, "budget": BUDGET}


def asking(value: Any, prompt: list[int], num_tokens: int = 1, **fields: Any) -> Request:
    request = greedy(prompt, num_tokens, **fields)
    request.sampling_params["custom_params"] = {"kv_prefix": value}
    return request


@cache
def texts(seed: int = 7) -> tuple[list[int], list[int], list[list[int]]]:
    """Return a document, a task, and six prompts, of which four begin alike."""
    rng = random.Random(seed)
    shared = random_ids(rng, 37)
    prompts = [[*shared, *random_ids(rng, length)] for length in (3, 9, 26, 1)]
    prompts += [random_ids(rng, length) for length in (1, 47)]
    return random_ids(rng, LENGTH), random_ids(rng, 21), prompts


def refusal_of(output: Output) -> str:
    assert output.finish_reason["type"] == "abort" and output.finish_reason["status_code"] == 400, output
    message = output.finish_reason["message"]
    assert "\n" not in message and "kv_prefix" not in output.info
    return str(message)
