"""The same requests at once on servers with different schedules: where tokens differ, something raced."""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.common.schema import Row
from benchmarks.common.settings import Setting
from benchmarks.common.statistics import compactions_before
from devtools.launch import Server
from rkv_sglang.config import REQUEST, PolicyConfig
from rkv_sglang.sizes.compaction_plan import LEAST_BLOCK
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.prompt_plan import can_compact_prompt

Schedule = tuple[tuple[str, ...], dict[str, str]]
# How servers with the policy are started: further flags, and variables of their environment.
SCHEDULES: dict[str, Schedule] = {
    "": ((), {}),
    ", coarse barrier": ((), {"SGLANG_FORCE_COARSE_WAR_BARRIER": "1"}),
    ", no overlap": (("--disable-overlap-schedule",), {}),
}
# Of the racing requests; with blocks, sizes are whole ones.
BUDGETS, BUFFERS, PROMPT_BUDGETS = (24, 120), (9, 48), (80, 160)
# One request in so many has its prompt compacted.
PROMPT_EVERY = 3


def racing_settings(setting: Setting) -> list[Setting]:
    """Return the settings of the servers that race for one policy, one a schedule."""
    return [
        replace(setting, name=setting.name + name, own_flags=own, environment=variables)
        for name, (own, variables) in SCHEDULES.items()
    ]


class Race:
    """The requests of one policy, and the tokens that all its servers must answer with.

    Attributes:
        expected: Token ids of the first run; None before it.
        asked: Of each request, what it asks of the policy.
    """

    def __init__(self, policy: Setting, options: argparse.Namespace) -> None:
        rng = random.Random(0)
        self.options = options
        self.expected: list[list[int]] | None = None
        self.prompts = [
            [rng.randrange(3, options.vocab_size) for _ in range(rng.randint(1, options.prompt_len))]
            for _ in range(options.race_requests)
        ]
        assert policy.config is not None
        config = replace(policy.config, block=LEAST_BLOCK if policy.config.granularity == REQUEST else 1)
        self.asked = [_asked(rng, config, number) for number in range(len(self.prompts))]
        self.due = [self._due(config, number) for number in range(len(self.prompts))]

    def _due(self, config: PolicyConfig, number: int) -> int:
        """Return how many compactions one request must have had."""
        asked, num_tokens = self.asked[number], self.options.race_tokens
        own = replace(config, prompt_budget=asked.get("kv_prompt_budget", 0))
        of_prompt = can_compact_prompt(own, len(self.prompts[number]), num_tokens)
        return compactions_before(num_tokens - 1, asked["kv_budget"], asked["kv_buffer"]) + of_prompt

    def run(self, server: Server, setting: Setting, number: int) -> tuple[Row, list[str]]:
        """Run the requests on one server and return the row of ``RACES``, and what is wrong with it."""
        server.flush_cache()
        answers = server.generate(self.prompts, self.options.race_tokens, custom_params=self.asked)
        found = [answer["output_ids"] for answer in answers]
        self.expected = found if self.expected is None else self.expected
        first = [_first_difference(mine, its) for mine, its in zip(found, self.expected, strict=True)]
        unequal = [place for place in first if place is not None]
        compactions = [int(answer["meta_info"].get("kv_compactions", 0)) for answer in answers]
        row: Row = {
            "setting": setting.name,
            "run": number,
            "requests": len(found),
            "num_tokens": self.options.race_tokens,
            "compactions": sum(compactions),
            "equal_answers": len(found) - len(unequal),
            "first_difference": min(unequal, default=-1),
        }
        where = f"{setting.name}, run {number}"
        wrong = [f"{where}: {len(unequal)} answers differ, first at {min(unequal)}"] if unequal else []
        due = self.due
        if setting.config is None:
            # A model that says the same whatever is in the cache would hide any race.
            due = [0] * len(found)
            wrong = [] if unequal else ["without compaction all answers are the same: equal answers show nothing"]
        if compactions != due:
            wrong.append(f"{where}: {sum(compactions)} compactions instead of {sum(due)}")
        return row, wrong


def _first_difference(mine: Sequence[int], its: Sequence[int]) -> int | None:
    return next((place for place, (one, other) in enumerate(zip(mine, its, strict=True)) if one != other), None)


def _asked(rng: random.Random, config: PolicyConfig, number: int) -> dict[str, Any]:
    """Draw what one request asks for."""
    least, most = BUDGETS
    # The window and one more to choose from, at the least.
    least = max(least, config.window + config.block)
    buffer = ceil_to_page(rng.randint(*BUFFERS), config.block)
    asked = {"kv_budget": rng.randint(least, max(least, most)), "kv_buffer": buffer}
    if number % PROMPT_EVERY == 0:
        asked["kv_prompt_budget"] = max(rng.randint(*PROMPT_BUDGETS), config.least_prompt_budget)
    return asked
