"""The oracle against transformers: HF generate where nothing is dropped, one masked pass of it all where it is."""

import copy
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from devtools.tiny_models import EOS_ID, PAD_ID, TINY_MODELS, VOCAB_SIZE, tiny_model_path
from tests.support.oracle.decoder import load_model, one_thread
from tests.support.oracle.dense import Compaction, DenseResult, dense_generate, dense_prefix
from tests.support.oracle.loop_scores import loop_rkv_scores
from tests.support.oracle.masked_compact import masked_compact
from tests.support.oracle.masked_forward import MaskedForward, masked_forward
from tests.support.oracle.policy_scores import score_function
from tests.support.oracle.scores import ScoreInputs

NEVER = 10**9


@pytest.fixture(autouse=True)
def transformers_on_one_thread_too() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(params=TINY_MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model(tiny_model_path(request.param))


@pytest.fixture
def exact_model(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model in fp64, with all that is computed of it: in fp32 two orders of summation differ by as much as scores
    may here."""
    torch.set_default_dtype(torch.float64)
    yield copy.deepcopy(model).double()
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of this run: {seed}")
    return random.Random(seed)


def random_prompt(rng: random.Random, prompt_len: int) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(prompt_len)]


def certain(result: DenseResult) -> int:
    num_certain = result.num_certain_outputs(logit_tolerance=1e-4)
    assert num_certain >= 1
    return num_certain


def test_equals_hf_generate_below_the_budget(model: PreTrainedModel, rng: random.Random) -> None:
    prompt = random_prompt(rng, rng.randrange(1, 40))
    result = dense_generate(model, prompt, 64, budget=NEVER, buffer=1, eos_token_ids={EOS_ID})
    until_end = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    generated = model.generate(torch.tensor([prompt]), generation_config=until_end)
    num_compared = certain(result)
    expected_ids = generated[0, len(prompt) :].tolist()
    assert result.output_ids[:num_compared] == expected_ids[:num_compared]
    if num_compared == len(result.output_ids):
        assert len(expected_ids) == num_compared
    assert result.compactions == []
    assert result.resident_lens == list(range(len(prompt), len(prompt) + len(result.output_ids)))


@pytest.mark.parametrize("retractions", [(), (26, 55)], ids=str)
def test_equals_one_masked_pass_of_transformers(
    exact_model: PreTrainedModel, retractions: tuple[int, ...], rng: random.Random
) -> None:
    model, (budget, buffer, window, num_outputs) = exact_model, (20, 12, 4, 72)
    num_compared_heads = num_heads = 0
    # Answers that repeat themselves have their ties together, so one prompt says little.
    for _ in range(3):
        prompt = random_prompt(rng, rng.randrange(1, 24))
        result = dense_generate(
            model, prompt, num_outputs, budget=budget, buffer=buffer, window=window, recompute_at=retractions
        )
        token_ids = prompt + result.output_ids
        # What came before a retraction was computed anew with full attention, so every stretch has a pass of its own.
        for start, end in pairwise((0, *retractions, num_outputs)):
            compactions = [c for c in result.compactions if start < c.num_outputs < end]
            stretch = token_ids[: len(prompt) + end]
            whole = masked_forward(model, stretch, visibility(model, len(prompt), len(stretch), compactions))
            rows = torch.arange(len(prompt) + start - 1, len(prompt) + end - 1)
            logprobs = whole.logits[rows].log_softmax(dim=-1)
            output_ids = torch.tensor(result.output_ids[start:end])
            torch.testing.assert_close(
                logprobs.gather(1, output_ids[:, None])[:, 0],
                torch.tensor(result.logprobs[start:end]),
                atol=2e-4,
                rtol=1e-5,
            )
            clear = torch.tensor(result.logit_gaps[start:end]) > 1e-3
            assert torch.equal(logprobs.argmax(dim=-1)[clear], output_ids[clear])
            for previous, compaction in pairwise((None, *compactions)):
                compared, of = compare_choice(whole, len(prompt), previous, compaction, budget, window)
                num_compared_heads += compared
                num_heads += of
    assert num_heads > 0
    # A similarity at the threshold, or a tie at the cut, may go either way. Both are rare.
    assert num_compared_heads >= 0.8 * num_heads


@pytest.mark.parametrize("block", [None, 16])
def test_passes_over_all_tokens_answer_as_a_dense_cache_whatever_is_guessed(
    block: int | None, rng: random.Random
) -> None:
    """Two ways to work out the same, one for tiny Llamas and one for whatever transformers runs."""
    path, prompt, score = (
        tiny_model_path("llama-gqa"),
        random_prompt(rng, rng.randrange(1, 24)),
        score_function("snapkv"),
    )
    sizes = {"budget": 22, "buffer": 16, "window": 4, "block": block, "score": score}
    dense = dense_generate(path, prompt, 62, **sizes)
    num_compared = certain(dense)
    guess = list(dense.output_ids)
    for place in rng.sample(range(62), 3):
        guess[place] = (guess[place] + 1) % VOCAB_SIZE
    for guessed in ((), dense.output_ids, guess):
        found = masked_compact(load_model(path), prompt, 62, **sizes, guessed_output_ids=guessed)
        assert found.output_ids[:num_compared] == dense.output_ids[:num_compared]
        if num_compared == 62:
            assert found.compactions == [compaction.num_outputs for compaction in dense.compactions] == [39, 55]
            torch.testing.assert_close(found.logit_gaps, dense.logit_gaps, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("block", [None, 16])
def test_an_answer_that_came_back_goes_on_as_one_that_is_computed_again(block: int | None, rng: random.Random) -> None:
    path, prompt = tiny_model_path("llama-gqa"), random_prompt(rng, rng.randrange(36, 50))
    sizes = {"budget": 22, "buffer": 16, "window": 4, "block": block, "prompt_budget": 20}
    sizes |= {"early": lambda ids, outputs: (ids[-1] + sum(outputs)) % 16 // (block or 1) * (block or 1)}
    for carried in (1, 11, 57):
        whole = dense_generate(path, prompt, 110, **sizes, recompute_at=(carried, carried + 20))
        came_back = whole.output_ids[:carried]
        rest = dense_generate(path, prompt, 110 - carried, **sizes, carried_ids=came_back, recompute_at=(20,))
        assert rest.output_ids == whole.output_ids[carried:]
        assert rest.logit_gaps == whole.logit_gaps[carried:]
        later = [compaction for compaction in whole.compactions if compaction.num_outputs > carried]
        assert later and len(rest.compactions) == len(later)
        for found, right in zip(rest.compactions, later, strict=True):
            assert found.num_outputs + carried == right.num_outputs
            assert torch.equal(found.kept_positions, right.kept_positions)


def visibility(
    model: PreTrainedModel, prompt_len: int, total_len: int, compactions: Sequence[Compaction]
) -> torch.Tensor:
    """Causal, and without what each compaction dropped from the first token fed after it on."""
    causal = torch.ones(total_len, total_len, dtype=torch.bool).tril()
    visible = causal.repeat(model.config.num_hidden_layers, model.config.num_key_value_heads, 1, 1)
    for compaction in compactions:
        first_fed_after = prompt_len + compaction.num_outputs - 1
        kept = torch.zeros(*visible.shape[:2], first_fed_after, dtype=torch.bool)
        kept.scatter_(-1, compaction.kept_positions, True)
        visible[:, :, first_fed_after:, :first_fed_after] &= kept[:, :, None]
    return visible


def compare_choice(
    whole: MaskedForward,
    prompt_len: int,
    previous: Compaction | None,
    compaction: Compaction,
    budget: int,
    window: int,
) -> tuple[int, int]:
    """Choose again from the queries and keys of the masked pass; return heads compared, heads in all."""
    resident_end = prompt_len + compaction.num_outputs - 1
    num_compared = num_heads = 0
    for layer, (queries, keys) in enumerate(zip(whole.queries, whole.keys, strict=True)):
        for head in range(keys.shape[0]):
            if previous is None:
                resident = torch.arange(resident_end)
            else:
                since = torch.arange(prompt_len + previous.num_outputs - 1, resident_end)
                resident = torch.cat((previous.kept_positions[layer, head], since))
            assert torch.equal(compaction.candidate_positions[layer, head], resident[prompt_len:-window])
            group = queries.shape[0] // keys.shape[0]
            expected = loop_rkv_scores(
                keys[head, resident],
                queries[head * group : (head + 1) * group, resident_end - window : resident_end],
                mix_lambda=0.5,
                kernel_size=7,
                similarity_threshold=0.5,
            )
            num_heads += 1
            if expected.threshold_distance < 1e-5:
                continue
            candidate_scores = expected.scores[prompt_len:]
            torch.testing.assert_close(
                compaction.candidate_scores[layer, head].double(), candidate_scores, atol=1e-6, rtol=1e-4
            )
            if compaction.margins[layer, head] < 1e-7:
                continue
            best = candidate_scores.topk(budget - window).indices.sort().values + prompt_len
            kept = torch.cat((resident[:prompt_len], resident[best], resident[-window:]))
            assert torch.equal(compaction.kept_positions[layer, head], kept)
            num_compared += 1
    return num_compared, num_heads


@pytest.mark.parametrize(("budget", "buffer", "window"), [(20, 12, 4), (9, 1, 8), (8, 3, 1), (30, 40, 8)], ids=str)
def test_schedule_and_counts(model: PreTrainedModel, budget: int, buffer: int, window: int, rng: random.Random) -> None:
    num_outputs = 90
    prompt = random_prompt(rng, rng.randrange(1, 30))
    prompt_len = len(prompt)
    result = dense_generate(model, prompt, num_outputs, budget=budget, buffer=buffer, window=window)
    # The first output comes from the prefill, so n decode steps leave n + 1 outputs of which n are resident.
    assert [c.num_outputs for c in result.compactions] == list(range(budget + buffer + 1, num_outputs, buffer))
    expected_lens = list(range(prompt_len, prompt_len + budget + buffer + 1))
    while len(expected_lens) < num_outputs:
        expected_lens += range(prompt_len + budget + 1, prompt_len + budget + buffer + 1)
    assert result.resident_lens == expected_lens[:num_outputs]
    num_layers, num_kv_heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    for compaction in result.compactions:
        kept = compaction.kept_positions
        resident_end = prompt_len + compaction.num_outputs - 1
        assert kept.shape == (num_layers, num_kv_heads, prompt_len + budget)
        assert (kept.diff(dim=-1) > 0).all()
        assert (kept[..., :prompt_len] == torch.arange(prompt_len)).all()
        assert (kept[..., -window:] == torch.arange(resident_end - window, resident_end)).all()
        assert (compaction.margins >= 0).all()


@pytest.mark.parametrize(
    ("retractions", "compacted_at"),
    [
        # Before the first compaction: it waits for the budget and buffer alone.
        ((5,), [33, 45, 57]),
        # Shortly before: it waits for the window of new queries too.
        ((31,), [36, 48, 60]),
        # After a compaction: all of the outputs are resident again, so the window is all it waits for.
        ((40,), [33, 45, 57]),
        ((50,), [33, 45, 55]),
        # Retracted again before the window is full.
        ((31, 34), [39, 51]),
        # Retracted in the very step in which it would have compacted.
        ((33,), [38, 50]),
    ],
)
def test_schedule_after_a_retraction(retractions: tuple[int, ...], compacted_at: list[int], rng: random.Random) -> None:
    model = load_model(tiny_model_path("llama-gqa"))
    prompt = random_prompt(rng, 11)
    result = dense_generate(model, prompt, 61, budget=20, buffer=12, window=4, recompute_at=retractions)
    assert [c.num_outputs for c in result.compactions] == compacted_at
    for retraction in retractions:
        assert result.resident_lens[retraction] == len(prompt) + retraction


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize(
    ("restores", "compacted_at"),
    [
        # Early enough: the window of new queries is full by the next compaction.
        ((40,), [33, 45, 57]),
        # It has to wait for that window.
        ((41,), [33, 46, 58]),
        ((44,), [33, 49, 61]),
        # Right after a compaction, and in the very step of one.
        ((34,), [33, 45, 57]),
        ((45,), [33, 45, 57]),
        ((35, 40), [33, 45, 57]),
    ],
)
def test_schedule_after_a_restore(
    restores: tuple[int, ...], compacted_at: list[int], in_flight: bool, rng: random.Random
) -> None:
    model = load_model(tiny_model_path("llama-gqa"))
    prompt = random_prompt(rng, 11)
    settings = {"budget": 20, "buffer": 12, "window": 4}
    if in_flight and restores == (44,):
        # The step in flight makes the compaction due, and it takes place before the request is stopped.
        compacted_at = [33, 45, 57]
    result = dense_generate(
        model,
        prompt,
        62,
        **settings,
        restore_at=restores,
        restored_in_flight=in_flight,  # type: ignore[arg-type]
    )
    assert [c.num_outputs for c in result.compactions] == compacted_at
    undisturbed = dense_generate(model, prompt, 62, **settings)  # type: ignore[arg-type]
    # A request that came back right after a compaction in flight computes its last token with what that left.
    if compacted_at == [33, 45, 57] and not (in_flight and restores == (44,)):
        assert result.output_ids == undisturbed.output_ids
        assert result.resident_lens == undisturbed.resident_lens
    else:
        assert result.output_ids[: restores[0]] == undisturbed.output_ids[: restores[0]]


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize(("evicted", "compacted_at"), [(12, [33, 45]), (0, [38, 50])])
@pytest.mark.parametrize("is_behind_prefix", [False, True])
def test_what_was_evicted_by_a_restore_says_whether_a_due_compaction_ran(
    is_behind_prefix: bool, evicted: int, compacted_at: list[int], in_flight: bool, rng: random.Random
) -> None:
    """Tokens that a named prefix had left out before are none of them."""
    model = load_model(tiny_model_path("llama-gqa"))
    settings = {"budget": 20, "buffer": 12, "window": 4}
    score = score_function("rkv")
    prefix = dense_prefix(model, random_prompt(rng, 40), random_prompt(rng, 6), 12, window=4, score=score)
    result = dense_generate(
        model,
        random_prompt(rng, 11),
        52,
        **settings,
        prefix=prefix if is_behind_prefix else None,
        restore_at=(33,),
        restored_in_flight=in_flight,
        evicted_at_restore={33: evicted},  # type: ignore[arg-type]
    )
    assert [c.num_outputs for c in result.compactions] == compacted_at


def test_stops_at_the_first_end_token(rng: random.Random) -> None:
    path = tiny_model_path("llama-gqa")
    prompt = random_prompt(rng, 9)
    whole = dense_generate(path, prompt, 60, budget=20, buffer=5).output_ids
    ended = dense_generate(path, prompt, 60, budget=20, buffer=5, eos_token_ids={whole[40], whole[50]}).output_ids
    first = min(whole.index(whole[40]), whole.index(whole[50]))
    assert ended == whole[: first + 1]


def test_forced_outputs_replace_the_greedy_ones(rng: random.Random) -> None:
    path = tiny_model_path("llama-gqa")
    prompt, forced = random_prompt(rng, 9), random_prompt(rng, 60)
    greedy = dense_generate(path, prompt, 60, budget=20, buffer=5)
    same = dense_generate(path, prompt, 99, budget=20, buffer=5, forced_output_ids=greedy.output_ids)
    assert (same.output_ids, same.logprobs) == (greedy.output_ids, greedy.logprobs)
    other = dense_generate(path, prompt, 99, budget=NEVER, buffer=1, forced_output_ids=forced)
    causal = visibility(load_model(path), len(prompt), 69, [])
    logprobs = masked_forward(load_model(path), prompt + forced, causal).logits[8:68].log_softmax(dim=-1)
    torch.testing.assert_close(
        torch.tensor(other.logprobs), logprobs[torch.arange(60), torch.tensor(forced)], atol=2e-4, rtol=1e-5
    )


@pytest.mark.parametrize("num_guessed", [30, 72, 100])
def test_a_guess_whatever_it_says_changes_nothing(model: PreTrainedModel, num_guessed: int, rng: random.Random) -> None:
    prompt = random_prompt(rng, rng.randrange(1, 24))
    settings = {"budget": 20, "buffer": 12, "window": 4, "recompute_at": (26,), "restore_at": (55,)}
    expected = dense_generate(model, prompt, 72, **settings)  # type: ignore[arg-type]
    # Right but for a token here and there, and for what comes after the end.
    guess = [*expected.output_ids, *random_prompt(rng, 28)]
    for place in rng.sample(range(72), 5):
        guess[place] = 3 + (guess[place] + 1) % (VOCAB_SIZE - 3)
    result = dense_generate(model, prompt, 72, **settings, guessed_output_ids=guess[:num_guessed])  # type: ignore[arg-type]
    num_compared = certain(expected)
    assert result.output_ids[:num_compared] == expected.output_ids[:num_compared]
    assert result.logprobs[:num_compared] == pytest.approx(expected.logprobs[:num_compared], abs=2e-4)
    assert result.resident_lens == expected.resident_lens
    for found, wanted in zip(result.compactions, expected.compactions, strict=True):
        assert found.num_outputs == wanted.num_outputs
        if found.num_outputs <= num_compared:
            assert torch.equal(found.kept_positions, wanted.kept_positions)


def test_another_score_decides_what_is_kept(rng: random.Random) -> None:
    def oldest_first(inputs: ScoreInputs) -> torch.Tensor:
        return -inputs.positions[:, : -inputs.window_queries.shape[1]].float()

    prompt = random_prompt(rng, 7)
    result = dense_generate(tiny_model_path("qwen3"), prompt, 60, budget=20, buffer=5, window=8, score=oldest_first)
    for compaction in result.compactions:
        resident_end = 7 + compaction.num_outputs - 1
        expected = torch.cat((torch.arange(7 + 12), torch.arange(resident_end - 8, resident_end)))
        assert (compaction.kept_positions == expected).all()


def test_certain_outputs_end_at_the_first_near_tie() -> None:
    def compaction(num_outputs: int, margin: float) -> Compaction:
        nothing = torch.empty(0)
        return Compaction(num_outputs, nothing, nothing, nothing, torch.tensor([[1.0, margin]]))

    result = DenseResult(output_ids=[7] * 6, logit_gaps=[1.0, 1.0, 1.0, 1.0, 1e-5, 1.0])
    assert result.num_certain_outputs() == 4
    result.compactions.extend([compaction(2, 1e-3), compaction(3, 1e-12)])
    assert result.num_certain_outputs() == 3
    assert result.num_certain_outputs(logit_tolerance=0.0, score_tolerance=0.0) == 6
