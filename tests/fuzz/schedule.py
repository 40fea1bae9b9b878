"""A schedule: one server's settings, requests, and what is done to them, as plain data that JSON can hold."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devtools.tiny_models import SLIDING_WINDOW, tiny_model_path
from rkv_sglang.config import BY_POLICY, HEAD, REQUEST
from rkv_sglang.sizes.compaction_plan import block_of_pages

# What the dense oracle knows of a request's sampling parameters.
KNOWN_TO_THE_ORACLE = {
    "stop_token_ids",
    "logit_bias",
    "min_new_tokens",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
}
# For --kv-policy triattention, which asks the model before it serves: few questions, to start quickly.
CALIBRATION = {"questions": 2, "answer_tokens": 40}
# For --kv-policy thinkv: what tiny models attend to are thoughts of several kinds.
THOUGHTS = {"negligible": 0.01, "execution_up_to": 0.1, "transition_above": 0.95}
# The longer of the two questions in a tiny model's chat template, with its answer.
CALIBRATION_ROOM = 100 + 40
# A tiny model of both kinds of layers.
SLIDING_MODEL = "olmo3"
# Why a request may lose its slots: an event of these kinds, or, without one, somebody of higher priority.
BY_PRIORITY = "preemption"
CAUSES = {"retract": "retraction", "pause_retract": "pause"}
# Of the layers of an fp8 pool, the factors of keys and of values.
FP8_SCALES = ((0.25, 0.02), (0.03, 0.125))


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server; schedules that share them run in one scheduler process, one after the other.

    Attributes:
        chunk_size: ``--chunked-prefill-size``; 0 leaves SGLang's.
        pool: Tokens of the KV pool.
        priority: Whether requests of higher priority preempt others.
        tokenizer: Whether the scheduler has one: stop strings and grammars need it.
        granularity: ``--kv-granularity``.
        mixed_chunk: Whether requests decode inside prefill batches.
        kv_dtype: ``--kv-cache-dtype``.
        prompt_budget: ``--kv-prompt-budget``.
        attn_dp_size: Ranks that have requests and a pool of their own; all other counts are those of one rank.
    """

    policy: str
    budget: int
    buffer: int
    window: int
    page_size: int
    chunk_size: int
    overlap: bool
    radix: bool
    stagger: bool
    priority: bool
    pool: int
    max_running: int
    tp_size: int = 1
    tokenizer: bool = False
    model: str = "llama-gqa"
    granularity: str = HEAD
    mixed_chunk: bool = False
    kv_dtype: str = "auto"
    prompt_budget: int = 0
    attn_dp_size: int = 1

    @property
    def flags(self) -> list[str]:
        """The command line of the server."""
        flags = ["--model-path", str(tiny_model_path(self.model)), "--kv-policy", self.policy]
        for name, value in (
            ("--kv-granularity", self.granularity),
            ("--kv-budget", self.budget),
            ("--kv-buffer", self.buffer),
            ("--kv-window", self.window),
            ("--page-size", self.page_size),
            ("--max-total-tokens", self.pool),
            ("--max-running-requests", self.max_running * self.attn_dp_size),
            ("--kv-cache-dtype", self.kv_dtype),
            ("--kv-prompt-budget", self.prompt_budget),
        ):
            flags += [name, str(value)]
        if self.chunk_size:
            flags += ["--chunked-prefill-size", str(self.chunk_size * self.attn_dp_size)]
        if self.tp_size > 1:
            flags += ["--tp-size", str(self.tp_size)]
        if self.attn_dp_size > 1:
            flags += ["--attn-dp-size", str(self.attn_dp_size)]
        if self.priority:
            flags += ["--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "0"]
        if self.policy == "triattention":
            flags += ["--kv-policy-config", json.dumps(CALIBRATION)]
        if self.policy == "thinkv":
            flags += ["--kv-policy-config", json.dumps(THOUGHTS)]
        switches = (
            (not self.overlap, "--disable-overlap-schedule"),
            (not self.radix, "--disable-radix-cache"),
            (self.stagger, "--kv-stagger"),
            (self.mixed_chunk, "--enable-mixed-chunk"),
            (not self.tokenizer, "--skip-tokenizer-init"),
        )
        return flags + [flag for is_set, flag in switches if is_set]

    @property
    def capacity(self) -> int:
        return self.budget + self.buffer

    @property
    def serves_prefixes(self) -> bool:
        """Whether it can make named prefixes."""
        has_one_rank = self.tp_size == self.attn_dp_size == 1
        return self.granularity == HEAD and self.radix and has_one_rank and self.model != SLIDING_MODEL

    @property
    def least_budget(self) -> int:
        """The smallest that a request may ask for."""
        unit = self.block or 1
        slides = self.model == SLIDING_MODEL and self.granularity == HEAD
        return max(self.window + max(unit - 1, 1), SLIDING_WINDOW if slides else 0)

    @property
    def env(self) -> dict[str, str]:
        """Variables that the server needs besides its flags."""
        variables = {}
        if self.kv_dtype != "auto":
            variables["RKV_STAND_IN_FP8"] = ",".join(f"{k_scale}:{v_scale}" for k_scale, v_scale in FP8_SCALES)
        if self.attn_dp_size > 1:
            variables["RKV_STAND_IN_PADDING"] = "1"
        return variables

    @property
    def block(self) -> int | None:
        """Tokens that are dropped together; None where every head chooses for itself."""
        return block_of_pages(self.page_size) if self.granularity == REQUEST else None


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
        if self.no_policy or self.asks("use"):
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
