"""Settings of a policy, validated once and frozen. Everything below reads them from here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

NO_POLICY = "none"
# Where the choice of what stays is made: per layer and KV head, or once for a whole request, in blocks of tokens.
HEAD, REQUEST = "head", "request"
GRANULARITIES = (HEAD, REQUEST)
# Under this name server arguments, requests, answers and the ready messages of processes say which policy is on.
POLICY_FIELD = "kv_policy"
# The same of the policy's own parameters.
PARAMETERS_FIELD = "kv_policy_config"
# Under this name requests make and use named prefixes.
PREFIX_FIELD = "kv_prefix"
# Who judges the document of one: the server's policy, all of the task, or the document itself, repeated.
BY_POLICY, BY_TASK, BY_REPEAT = "policy", "task", "repeat"
JUDGES = (BY_POLICY, BY_TASK, BY_REPEAT)
# Holds the policy's flags for programs that make the record of server arguments themselves and cannot pass them on.
ARGS_VARIABLE = "RKV_SGLANG_ARGS"
# First tokens of a prompt that stay when it is compacted, attention sinks (arXiv 2309.17453).
NUM_FIRST_KEPT = 4
# Lengths are kept in 32 bits on the device.
MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How much a policy keeps, and when it compacts. All counts are integer tokens.

    Attributes:
        policy: Name of the policy; ``"none"`` leaves SGLang as it is. The policies know which names there are, so an
            unknown one is refused where the policy is made.
        granularity: ``"head"``: every layer and KV head keeps tokens of its own, which are moved; ``"request"``: all
            keep the same, whole blocks are dropped and nothing is moved.
        budget: Generated tokens kept per layer and KV head after a compaction, the window included.
        buffer: Generated tokens that may gather above the budget before the next compaction.
        block: Tokens that are dropped together; 1 where every head chooses for itself.
        window: The most recent tokens; their queries observe the cache and they are always kept.
        mix_lambda: Weight of importance against redundancy in the R-KV score, in [0, 1] (arXiv 2505.24133).
        kernel_size: Width of the max-pool over importance, odd, stride 1.
        similarity_threshold: Cosine above which two keys count as near-duplicates, in [-1, 1].
        parameters: Further parameters of the policy by name; where the policy is made they are checked, and come before
            the settings above.
        prompt_budget: Prompt tokens kept per layer and KV head of a longer prompt, once ``window`` generated tokens are
            held; 0 keeps every prompt whole.
        stagger: Whether a request's first compaction comes early, by a number of tokens of its own.
        trace: Whether requests may ask that their compactions be recorded, which makes the scheduler wait for the
            device at each.

    Raises:
        ValueError: A value is out of range; the message is one line that names the flag and the mend.
    """

    policy: str = "rkv"
    granularity: str = HEAD
    budget: int = 1024
    buffer: int = 128
    block: int = 1
    window: int = 8
    mix_lambda: float = 0.5
    kernel_size: int = 7
    similarity_threshold: float = 0.5
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    prompt_budget: int = 0
    stagger: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        for problem in value_problems(self):
            raise ValueError(problem)

    @property
    def capacity(self) -> int:
        """Most generated tokens a request holds: at this many it is compacted before its next decode step."""
        return self.budget + self.buffer

    @property
    def least_prompt_budget(self) -> int:
        """Smallest prompt budget but 0: the first tokens, the last of a window, and one or a block to choose."""
        return _least_prompt_budget(self.window, self.block)

    @property
    def least_budget(self) -> int:
        """Smallest budget beside the window: something else must stay, and enough whole blocks be free to go."""
        return self.window + max(self.block - 1, 1)


def value_problems(settings: Any) -> Iterator[str]:
    """Yield one line, which names the flag and the mend, for every value that is out of range.

    Args:
        settings: Whatever has the attributes of a ``PolicyConfig``, of any type.
    """
    if not isinstance(settings.policy, str) or not settings.policy:
        yield f"--kv-policy {_shown(settings.policy)} is not a name: set --kv-policy to the name of a policy"
    if settings.granularity not in GRANULARITIES:
        yield (
            f"--kv-granularity {_shown(settings.granularity)} is unknown: set --kv-granularity to one of "
            f"{', '.join(GRANULARITIES)}"
        )
    for flag, switch in (("--kv-stagger", settings.stagger), ("--kv-trace", settings.trace)):
        if not isinstance(switch, bool):
            yield f"{flag} {_shown(switch)} is not a boolean: set {flag} or leave it out"
    bad_counts = set()
    for flag, value, least in (
        ("--kv-window", settings.window, 1),
        ("--kv-buffer", settings.buffer, 1),
        ("--kv-budget", settings.budget, 2),
        ("--rkv-kernel-size", settings.kernel_size, 1),
        ("--kv-prompt-budget", settings.prompt_budget, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            bad_counts.add(flag)
            yield f"{flag} {_shown(value)} is not an integer of at least {least}: set {flag} {least} or more"
        elif value > MOST_TOKENS:
            bad_counts.add(flag)
            yield f"{flag} {_shown(value)} is more than any context has: set {flag} {MOST_TOKENS} or less"
    if not bad_counts & {"--kv-window", "--kv-budget"} and settings.budget <= settings.window:
        yield (
            f"--kv-budget {settings.budget} must be greater than --kv-window {settings.window}, because the window is "
            f"kept inside the budget: set --kv-budget {settings.window + max(settings.block - 1, 1)} or more"
        )
    elif not bad_counts & {"--kv-window", "--kv-budget"} and settings.budget < settings.window + settings.block - 1:
        yield (
            f"--kv-budget {settings.budget} leaves no whole block of {settings.block} tokens to choose beside "
            f"--kv-window {settings.window}: set --kv-budget {settings.window + settings.block - 1} or more"
        )
    if not bad_counts & {"--kv-window", "--kv-prompt-budget"} and settings.prompt_budget > 0:
        least = _least_prompt_budget(settings.window, settings.block)
        if settings.prompt_budget < least:
            yield (
                f"--kv-prompt-budget {settings.prompt_budget} leaves nothing to choose: the first {NUM_FIRST_KEPT} and "
                f"the last {settings.window} tokens of a prompt (--kv-window) always stay"
                f"{f', and blocks of {settings.block} go whole' if settings.block > 1 else ''}; set --kv-prompt-budget "
                f"{least} or more, or 0 to keep prompts whole"
            )
    if "--kv-buffer" not in bad_counts and settings.buffer % settings.block != 0:
        more = settings.buffer + settings.block - settings.buffer % settings.block
        yield (
            f"--kv-buffer {settings.buffer} is no multiple of the {settings.block} tokens that --kv-granularity "
            f"{settings.granularity} drops together: set --kv-buffer {more}"
        )
    if "--rkv-kernel-size" not in bad_counts and settings.kernel_size % 2 == 0:
        yield (
            f"--rkv-kernel-size {settings.kernel_size} is even, so its max-pool has no centre: "
            f"set --rkv-kernel-size {settings.kernel_size + 1}"
        )
    for flag, number, low in (
        ("--rkv-mix-lambda", settings.mix_lambda, 0.0),
        ("--rkv-similarity-threshold", settings.similarity_threshold, -1.0),
    ):
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        # Not so of NaN either.
        if not is_number or not low <= number <= 1.0:
            yield f"{flag} {_shown(number)} is not a number in [{low:g}, 1]: set {flag} between {low:g} and 1"


def _least_prompt_budget(window: int, block: int) -> int:
    # The first block holds the first tokens; before the window there may be less than a block that cannot go.
    return window + (NUM_FIRST_KEPT + 1 if block == 1 else 2 * block)


def _shown(value: Any) -> str:
    # Here, so that processes without a policy load one module less.
    from rkv_sglang.messages import shown

    return shown(value)
