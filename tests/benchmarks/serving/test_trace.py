"""The trace of the serving benchmark: repeatable, and what it says it is."""

import random
import statistics

import pytest

from benchmarks.serving.trace import LOCKSTEP, POISSON, TraceSpec, Turn, arrival_times, make_trace, next_prompt

VOCABULARY = range(3, 500)


def random_spec(rng: random.Random) -> TraceSpec:
    low = rng.randint(1, 20)
    return TraceSpec(
        num_requests=rng.randint(1, 30),
        turns=rng.randint(1, 4),
        prompt_len=(low, low + rng.randint(0, 20)),
        output_len=(low, low + rng.randint(0, 90)),
        shared_prompts=rng.randint(0, 3),
        shared_len=rng.randint(1, 30),
        arrivals=rng.choice([LOCKSTEP, POISSON]),
        rate=rng.uniform(0.1, 10),
    )


def test_equal_seeds_give_equal_traces_and_others_do_not(rng: random.Random) -> None:
    spec = TraceSpec(num_requests=8, prompt_len=(9, 20), output_len=(5, 50), shared_prompts=2, shared_len=4)
    seed = rng.randrange(1000)
    assert make_trace(spec, seed, VOCABULARY) == make_trace(spec, seed, VOCABULARY)
    assert make_trace(spec, seed, VOCABULARY) != make_trace(spec, seed + 1, VOCABULARY)


def test_sizes_are_within_their_limits(rng: random.Random) -> None:
    spec = random_spec(rng)
    trace = make_trace(spec, rng.randrange(1000), VOCABULARY)
    assert len(trace) == spec.num_requests
    for conversation in trace:
        assert len(conversation.turns) == spec.turns and conversation.num_tokens <= spec.longest
        for i, turn in enumerate(conversation.turns):
            shared = spec.shared_len if i == 0 and spec.shared_prompts else 0
            assert spec.prompt_len[0] <= len(turn.new_tokens) - shared <= spec.prompt_len[1]
            assert spec.output_len[0] <= turn.output_len <= spec.output_len[1]


def test_shared_prompts_are_shared_and_nothing_else_is() -> None:
    spec = TraceSpec(num_requests=40, prompt_len=(12, 12), output_len=(5, 5), shared_prompts=3, shared_len=16)
    firsts = [conversation.turns[0].new_tokens for conversation in make_trace(spec, 0, VOCABULARY)]
    assert len({tokens[:16] for tokens in firsts}) == 3
    # The first token behind the shared prompt already differs for most: there is nothing more to find in a cache.
    assert len({tokens[16:] for tokens in firsts}) == 40
    none = TraceSpec(num_requests=40, prompt_len=(12, 12), output_len=(5, 5), shared_len=16)
    assert len({c.turns[0].new_tokens[:4] for c in make_trace(none, 0, VOCABULARY)}) == 40


def test_arrivals_do_not_change_what_is_asked() -> None:
    sizes = {"num_requests": 9, "prompt_len": (4, 30), "output_len": (5, 50), "turns": 2}
    lockstep = make_trace(TraceSpec(**sizes), 5, VOCABULARY)  # type: ignore[arg-type]
    poisson = make_trace(TraceSpec(**sizes, arrivals=POISSON, rate=3), 5, VOCABULARY)  # type: ignore[arg-type]
    assert [c.turns for c in lockstep] == [c.turns for c in poisson]
    assert {c.arrival_s for c in lockstep} == {0.0}
    assert len({c.arrival_s for c in poisson}) == 9


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    spec = TraceSpec(num_requests=4000, prompt_len=(1, 1), output_len=(1, 1), arrivals=POISSON, rate=5)
    times = arrival_times(spec, 1)
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert min(gaps) > 0
    # Mean and standard deviation of an exponential distribution are equal; 5 standard errors of 4000 draws.
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.08)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.12)


def test_a_later_prompt_is_all_that_was_said_and_the_new_text() -> None:
    assert next_prompt([1, 2], [7, 8, 9], Turn((4, 5), 10)) == [1, 2, 7, 8, 9, 4, 5]
    assert next_prompt([], [], Turn((4, 5), 10)) == [4, 5]


def test_questions_are_taken_in_turn() -> None:
    spec = TraceSpec(num_requests=2, turns=2, prompt_len=(1, 1), output_len=(3, 3))
    trace = make_trace(spec, 0, VOCABULARY, questions=[[1], [2, 2], [3]])
    assert [turn.new_tokens for conversation in trace for turn in conversation.turns] == [(1,), (2, 2), (3,), (1,)]
