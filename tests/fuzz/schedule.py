"""A schedule: one server's settings, requests, and what is done to them, as plain data that JSON can hold."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkv_sglang.config import BY_POLICY
from tests.fuzz.server import ServerConfig

# What the dense oracle knows of a request's sampling parameters.
KNOWN_TO_THE_ORACLE = {
    "stop_token_ids",
    "logit_bias",
    "min_new_tokens",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
}
# Why a request may lose its slots: an event of these kinds, or, without one, somebody of higher priority.
BY_PRIORITY = "preemption"
CAUSES = {"retract": "retraction", "pause_retract": "pause"}


@dataclass(frozen=True, kw_only=True)
class FuzzRequest:
    """One request of a schedule.

    Attributes:
        prompt: Token ids; of a follow-up those after the answer before.
        max_new_tokens: Its length limit.
        at_pass: Pass of the event loop at which it arrives, counted from the end of what it waits for.
        after: Index of the request whose end it waits for; None for none.
        continues: It is the next turn of ``after``: its prompt starts with that one's prompt and answer.
        budget, buffer, prompt_budget: Settings of its own; None for the server's.
        no_policy: It asks for no policy.
        garbage: It asks for what cannot be; the answer is a status 400.
        ignore_eos: Whether tokens that end an answer are generated like others.
        abort_at: The pass at which it is aborted, counted from the schedule's start.
        abort_after: It is aborted once it has so many tokens.
        prefix: What it asks of named prefixes, as ``kv_prefix``: a name to go on from, or an object.
        marked: As ``kv_prompt_len``, how many of its tokens are its prompt, the others an answer that came back; of a
            follow-up so many behind the former prompt. None: all are its prompt.
        picture, picture_at: Which image is in its prompt, and the place of its first token there; None for none.
        logprobs: Return log-probabilities of the output.
        prompt_logprobs: Return those of the prompt, too, which is then computed anew.
        params: Further sampling parameters; what the oracle does not know of makes it compared with itself alone.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    at_pass: int = 0
    after: int | None = None
    continues: bool = False
    budget: int | None = None
    buffer: int | None = None
    prompt_budget: int | None = None
    no_policy: bool = False
    garbage: bool = False
    ignore_eos: bool = True
    abort_at: int | None = None
    abort_after: int | None = None
    priority: int | None = None
    prefix: Any = None
    marked: int | None = None
    picture: int | None = None
    picture_at: int = 0
    logprobs: bool = False
    prompt_logprobs: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)

    def capacity(self, server: ServerConfig) -> int:
        """Most generated tokens it may hold."""
        return (self.budget or server.budget) + (self.buffer or server.buffer)

    def asks(self, action: str) -> bool:
        """Return whether it asks this of named prefixes: ``create``, ``delete``, ``list`` or ``use``."""
        return action == "use" if isinstance(self.prefix, str) else action in (self.prefix or {})

    def kept_of_prompt(self, server: ServerConfig) -> int:
        """Tokens of its prompt that stay where that is longer; 0: all."""
        # A prompt with an image stays whole.
        if self.no_policy or self.asks("use") or self.picture is not None:
            return 0
        return server.prompt_budget if self.prompt_budget is None else self.prompt_budget

    @property
    def made(self) -> dict[str, Any]:
        """What answers say of the named prefix that it makes."""
        sizes = {name: self.prefix[name] for name in ("length", "budget")}
        return {"name": self.prefix["create"], **sizes, "judge": self.prefix.get("judge", BY_POLICY)}

    @property
    def needs_itself_alone(self) -> bool:
        """Whether only SGLang itself knows the right answer."""
        return bool(set(self.params) - KNOWN_TO_THE_ORACLE)

    @property
    def sampling_params(self) -> dict[str, Any]:
        """As in SGLang's ``/generate``."""
        custom: dict[str, Any] = {}
        if self.budget is not None:
            custom["kv_budget"] = self.budget
        if self.buffer is not None:
            custom["kv_buffer"] = self.buffer
        if self.prompt_budget is not None:
            custom["kv_prompt_budget"] = self.prompt_budget
        if self.prefix is not None:
            custom["kv_prefix"] = self.prefix
        if self.marked is not None:
            custom["kv_prompt_len"] = self.marked
        if self.no_policy:
            custom["kv_policy"] = "none"
        if self.garbage:
            custom["kv_budget"] = "many"
        params: dict[str, Any] = {
            "temperature": 0.0,
            "max_new_tokens": self.max_new_tokens,
            "ignore_eos": self.ignore_eos,
            **self.params,
        }
        return params | ({"custom_params": custom} if custom else {})


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something done to the scheduler at the start of a pass, counted from the schedule's start.

    ``kind`` is retract, pause_retract, pause_in_place, continue, flush or abort_all.
    """

    at_pass: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All that one run is made of; ``seed`` is that of the generator, of a smaller one too."""

    seed: int
    server: ServerConfig
    requests: tuple[FuzzRequest, ...]
    events: tuple[Event, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        data = json.loads(text)
        requests = [FuzzRequest(**{**entry, "prompt": tuple(entry["prompt"])}) for entry in data["requests"]]
        return cls(
            seed=data["seed"],
            server=ServerConfig(**data["server"]),
            requests=tuple(requests),
            events=tuple(Event(**entry) for entry in data["events"]),
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n")

    def rank_of(self, index: int) -> int:
        """Return the rank that a request is sent to: with data-parallel attention, that of the one it waits for."""
        after = self.requests[index].after
        return index % self.server.attn_dp_size if after is None else self.rank_of(after)

    def without_request(self, index: int) -> "Schedule":
        """Return it without one request and those that wait for it."""
        gone = {index}
        for i, request in enumerate(self.requests):
            if request.after in gone:
                gone.add(i)
        left = [i for i in range(len(self.requests)) if i not in gone]
        place = {old: new for new, old in enumerate(left)}
        requests = [
            dataclasses.replace(self.requests[i], after=place.get(self.requests[i].after))  # type: ignore[arg-type]
            for i in left
        ]
        return dataclasses.replace(self, requests=tuple(requests))

    def without_event(self, index: int) -> "Schedule":
        """Return it without one event; a pause that nobody ends is ended when all else is done."""
        return dataclasses.replace(self, events=self.events[:index] + self.events[index + 1 :])


def rid_of(number: int, index: int) -> str:
    """Return the id of a request of a process's ``number``-th schedule. Equally long: SGLang aborts by prefix."""
    return f"s{number:05d}r{index:03d}"
