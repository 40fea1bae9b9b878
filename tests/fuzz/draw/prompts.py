"""What is kept of long prompts: drawn apart, so that other seeds stay what they were."""

import random
from dataclasses import replace

from rkv_sglang.config import NUM_FIRST_KEPT
from tests.fuzz.schedule import FuzzRequest
from tests.fuzz.server import SLIDING_MODELS, ServerConfig


def draw_prompt_budget(rng: random.Random, model: str | None, window: int, unit: int) -> int:
    """Return 0 or what is kept of longer prompts, near the least; ``unit`` is the tokens that go together."""
    if (model in SLIDING_MODELS and unit == 1) or rng.random() < 0.5:
        return 0
    least = window + (NUM_FIRST_KEPT + 1 if unit == 1 else 2 * unit)
    return least + rng.choice([0, 0, 1, 4, 11])


def with_prompt_budgets(seed: int, server: ServerConfig, requests: list[FuzzRequest]) -> list[FuzzRequest]:
    """Give some requests a prompt budget of their own."""
    rng = random.Random(f"prompts of {seed}")
    drawn = [
        draw_prompt_budget(random.Random(f"{seed} {number}"), server.model, server.window, server.block or 1)
        if rng.random() < 0.45 and not request.no_policy
        else None
        for number, request in enumerate(requests)
    ]
    return [replace(request, prompt_budget=own) for request, own in zip(requests, drawn, strict=True)]
