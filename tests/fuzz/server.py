"""The settings of one server, as plain data that JSON can hold."""

import json
from dataclasses import dataclass

from devtools.tiny_models import SINKS_MODEL, SLIDING_WINDOW, tiny_model_path
from rkv_sglang.config import HEAD, REQUEST
from rkv_sglang.sizes.compaction_plan import block_of_pages

# For --kv-policy triattention, which asks the model before it serves: few questions, to start quickly.
CALIBRATION = {"questions": 2, "answer_tokens": 40}
# For --kv-policy thinkv: what tiny models attend to are thoughts of several kinds.
THOUGHTS = {"negligible": 0.01, "execution_up_to": 0.1, "transition_above": 0.95}
# The longer of the two questions in a tiny model's chat template, with its answer.
CALIBRATION_ROOM = 100 + 40
# Tiny models of both kinds of layers; one of them has attention sinks, too.
SLIDING_MODELS = ("olmo3", SINKS_MODEL)
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
        if self.model == SINKS_MODEL:
            # It stands for SGLang's backend of Blackwell: none of a CPU takes sinks.
            flags += ["--attention-backend", "triton"]
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
        slides = self.model in SLIDING_MODELS and self.granularity == HEAD
        return self.radix and has_one_rank and not slides

    @property
    def least_budget(self) -> int:
        """The smallest that a request may ask for."""
        unit = self.block or 1
        slides = self.model in SLIDING_MODELS and self.granularity == HEAD
        return max(self.window + max(unit - 1, 1), SLIDING_WINDOW if slides else 0)

    @property
    def env(self) -> dict[str, str]:
        """Variables that the server needs besides its flags."""
        variables = {}
        if self.kv_dtype != "auto":
            variables["RKV_STAND_IN_FP8"] = ",".join(f"{k_scale}:{v_scale}" for k_scale, v_scale in FP8_SCALES)
        if self.attn_dp_size > 1:
            variables["RKV_STAND_IN_PADDING"] = "1"
        if self.model == SINKS_MODEL:
            variables["RKV_STAND_IN_TRTLLM"] = "1"
        return variables

    @property
    def block(self) -> int | None:
        """Tokens that are dropped together; None where every head chooses for itself."""
        return block_of_pages(self.page_size) if self.granularity == REQUEST else None
