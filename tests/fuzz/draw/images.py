"""Images in prompts: drawn apart, so that other seeds stay what they were, for the model that sees them."""

import random
from dataclasses import replace

import torch

from devtools.tiny_models import IMAGE_MODEL, IMAGE_TOKEN_ID
from tests.fuzz.draw.servers import is_tight, most_prompt
from tests.fuzz.schedule import FuzzRequest, Schedule
from tests.support.oracle.images import Image

SHARE = 0.45
# Of each picture the rows and columns of its embeddings.
SHAPES = ((2, 3), (3, 3))
# Numbers of an embedding of the tiny model.
_WIDTH = 128
# What stands before and after an image's tokens.
_START, _END = IMAGE_TOKEN_ID - 2, IMAGE_TOKEN_ID - 3


def image_of(request: FuzzRequest) -> Image | None:
    """Return the image in a request's prompt; None if there is none."""
    if request.picture is None:
        return None
    rows, columns = SHAPES[request.picture]
    generator = torch.Generator().manual_seed(request.picture)
    return Image(request.picture_at, columns, torch.randn(rows * columns, _WIDTH, generator=generator))


def with_images(seed: int, schedule: Schedule) -> Schedule:
    """Return a schedule in which some prompts have an image, where the server's model sees it.

    None where head starts are spread: they are drawn from tokens, and SGLang puts others in an image's place.
    """
    rng, server = random.Random(f"images {seed}"), schedule.server
    if server.model != IMAGE_MODEL or server.stagger:
        return schedule
    requests: list[FuzzRequest] = []
    for request in schedule.requests:
        # Few, so that prompts share them, or part at them.
        is_wanted, picture, place = rng.random() < SHARE, rng.choice([0, 0, 1]), rng.choice([0, 3, 10**6])
        if request.continues and request.after is not None:
            before = requests[request.after]
            # A named prefix does not go with an image.
            without = replace(request, prompt_logprobs=False, prefix=None)
            with_it = replace(without, picture=before.picture, picture_at=before.picture_at)
            requests.append(request if before.picture is None else with_it)
        elif is_wanted and not request.garbage and request.prefix is None:
            requests.append(_with_image(request, picture, place, is_tight(server)))
        else:
            requests.append(request)
    return replace(schedule, requests=tuple(requests))


def _with_image(request: FuzzRequest, picture: int, place: int, tight: bool) -> FuzzRequest:
    """Return a request with an image in its prompt, as it is where there is no room; text stays behind the image."""
    rows, columns = SHAPES[picture]
    tokens = (_START, *[IMAGE_TOKEN_ID] * (rows * columns), _END)
    most_text = (len(request.prompt) if tight else most_prompt(tight)) - len(tokens)
    if most_text < 1:
        return request
    text = request.prompt[:most_text]
    place = min(place, len(text) - 1)
    prompt = (*text[:place], *tokens, *text[place:])
    # SGLang looks for the log-probabilities of its own stand-ins for an image, which are no tokens.
    return replace(request, prompt=prompt, picture=picture, picture_at=place + 1, prompt_logprobs=False)
