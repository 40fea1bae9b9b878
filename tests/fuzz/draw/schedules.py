"""From one integer to a schedule. Seeds of one block share a server, so one scheduler process runs them all."""

import random

from tests.fuzz.draw.images import with_images
from tests.fuzz.draw.marks import with_marks
from tests.fuzz.draw.prefixes import with_prefixes
from tests.fuzz.draw.prompts import with_prompt_budgets
from tests.fuzz.draw.requests import draw_requests
from tests.fuzz.draw.restores import with_restores
from tests.fuzz.draw.servers import server_of
from tests.fuzz.schedule import Event, Schedule

# Schedules of one server.
BLOCK = 25


def schedule_of(seed: int) -> Schedule:
    """Return the schedule of a seed."""
    server = server_of(seed // BLOCK)
    rng = random.Random(f"schedule {seed}")
    requests = with_prompt_budgets(seed, server, draw_requests(rng, server))
    schedule = Schedule(seed=seed, server=server, requests=tuple(requests), events=tuple(_events(rng)))
    # Drawn apart, so that other seeds stay what they were.
    schedule = with_restores(random.Random(f"restores {seed}"), schedule)
    return with_marks(seed, with_images(seed, with_prefixes(seed, schedule)))


def _events(rng: random.Random) -> list[Event]:
    events: list[Event] = []
    if rng.random() < 0.35:
        events += [Event(at_pass=rng.randrange(3, 90), kind="retract") for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.22:
        start = rng.randrange(1, 80)
        length = rng.randint(1, 6)
        events.append(Event(at_pass=start, kind=rng.choice(["pause_retract", "pause_in_place"])))
        if rng.random() < 0.3:
            events.append(Event(at_pass=start + rng.randint(0, length), kind="flush"))
        events.append(Event(at_pass=start + length, kind="continue"))
    if rng.random() < 0.08:
        events.append(Event(at_pass=rng.randrange(0, 80), kind="flush"))
    if rng.random() < 0.03:
        events.append(Event(at_pass=rng.randrange(5, 80), kind="abort_all"))
    return sorted(events, key=lambda event: event.at_pass)
