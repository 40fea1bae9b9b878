"""The request trace that is replayed: conversations with arrival times, token ids and output lengths.

A trace depends on its spec and seed alone, so every server gets the same one. Answers are not part of it: the prompt of
a later turn is made while the trace is replayed, from the answer that this server gave.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

LOCKSTEP, POISSON = "lockstep", "poisson"
ARRIVALS = (LOCKSTEP, POISSON)
Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TraceSpec:
    """What a trace is drawn from.

    Attributes:
        num_requests: Conversations; each has ``turns`` requests, one after the other.
        turns: Requests of a conversation.
        prompt_len: Least and most new tokens of a turn, the shared prompt not counted; uniform.
        output_len: Least and most tokens generated in a turn; uniform.
        shared_prompts: Different prompts that conversations begin with, drawn at random; 0: none begins with one.
        shared_len: Tokens of each of them.
        arrivals: ``lockstep``: all at 0; ``poisson``: ``rate`` conversations a second on average.
    """

    num_requests: int
    prompt_len: Range
    output_len: Range
    turns: int = 1
    shared_prompts: int = 0
    shared_len: int = 0
    arrivals: str = LOCKSTEP
    rate: float = 1.0

    @property
    def longest(self) -> int:
        """Most tokens that one conversation can reach, its last answer included."""
        shared = self.shared_len if self.shared_prompts else 0
        return shared + self.turns * (self.prompt_len[1] + self.output_len[1])


@dataclass(frozen=True)
class Turn:
    """One request: the tokens it adds to the conversation, and how many it asks for (the most, if answers may end)."""

    new_tokens: tuple[int, ...]
    output_len: int


@dataclass(frozen=True)
class Conversation:
    """Requests of one user: the first at ``arrival_s``, each other as soon as the one before it is answered."""

    arrival_s: float
    turns: tuple[Turn, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens at the end, if every answer has its full length."""
        return sum(len(turn.new_tokens) + turn.output_len for turn in self.turns)


def make_trace(
    spec: TraceSpec, seed: int, vocabulary: Sequence[int], questions: Sequence[Sequence[int]] = ()
) -> list[Conversation]:
    """Return the conversations by arrival; equal arguments give equal traces.

    Args:
        spec: Numbers and distributions.
        seed: Of everything that is drawn. Arrivals do not change what is asked.
        vocabulary: Token ids that prompts are drawn from.
        questions: Token ids of prompts to take in turn instead of drawing them; ``prompt_len`` is then not used.
    """
    rng = random.Random(f"{seed} contents")
    shared = [tuple(rng.choices(vocabulary, k=spec.shared_len)) for _ in range(spec.shared_prompts)]
    asked = itertools.cycle(questions) if questions else None

    def new_tokens() -> tuple[int, ...]:
        if asked is not None:
            return tuple(next(asked))
        return tuple(rng.choices(vocabulary, k=rng.randint(*spec.prompt_len)))

    conversations = []
    for arrival_s in arrival_times(spec, seed):
        first = rng.choice(shared) if shared else ()
        turns = tuple(
            Turn((*first, *new_tokens()) if i == 0 else new_tokens(), rng.randint(*spec.output_len))
            for i in range(spec.turns)
        )
        conversations.append(Conversation(arrival_s, turns))
    return conversations


def arrival_times(spec: TraceSpec, seed: int) -> list[float]:
    """Return the seconds from the start at which conversations arrive, rising."""
    if spec.arrivals == LOCKSTEP:
        return [0.0] * spec.num_requests
    rng = random.Random(f"{seed} arrivals")
    return list(itertools.accumulate(rng.expovariate(spec.rate) for _ in range(spec.num_requests)))


def next_prompt(prompt: Sequence[int], answer: Sequence[int], turn: Turn) -> list[int]:
    """Return the prompt of a conversation's next turn: all that was said, then the turn's own tokens."""
    return [*prompt, *answer, *turn.new_tokens]
