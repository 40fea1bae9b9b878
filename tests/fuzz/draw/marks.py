"""Answers that come back: requests that mark which of their tokens are the prompt. Drawn apart, as the others are."""

import random
from dataclasses import replace

from tests.fuzz.draw.images import image_of
from tests.fuzz.schedule import FuzzRequest, Schedule

# Shares of the follow-ups, whose former answers come back, and of other requests.
OF_FOLLOW_UPS, OF_OTHERS = 0.8, 0.2


def with_marks(seed: int, schedule: Schedule) -> Schedule:
    """Return a schedule in which some requests mark their prompts."""
    rng = random.Random(f"marked {seed}")
    return replace(schedule, requests=tuple(_marked(rng, request) for request in schedule.requests))


def _marked(rng: random.Random, request: FuzzRequest) -> FuzzRequest:
    is_marked, num_tokens = rng.random() < (OF_FOLLOW_UPS if request.continues else OF_OTHERS), len(request.prompt)
    if request.continues:
        # Most often the answer alone comes back, and nothing of another turn.
        own = 0 if rng.random() < 0.7 else num_tokens
        marked, prompt = rng.choice([0, 0, 1, num_tokens]), request.prompt[:own]
    else:
        marked = rng.choice([1, 2, num_tokens - 1, num_tokens, *(rng.randint(1, num_tokens) for _ in range(4))])
        # Images stay.
        image = image_of(request)
        least = 1 if image is None else image.first + image.num_tokens
        marked, prompt = min(max(marked, least), num_tokens), request.prompt
    # Named prefixes and requests without a policy have no marks: those are refused.
    if not is_marked or request.garbage or request.no_policy or request.prefix is not None:
        return request
    return replace(request, marked=marked, prompt=prompt)
