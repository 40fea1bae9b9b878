"""The forcing processor against a direct computation on random logits, called as SGLang calls it."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from benchmarks.quality.forcing import REQUEST_FIELD, ForcingProcessor, forcing_params, kl_divergence, read_record

VOCAB = 50


class Request:
    """Stands for SGLang's, of which the processor only needs that it keeps an attribute."""


def call(logits: torch.Tensor, params: list[dict[str, Any] | None]) -> list[int]:
    """Run a processor made anew, as SGLang does for every batch, and sample greedily."""
    processor = CustomLogitProcessor.from_str(ForcingProcessor.to_str())
    return [int(token) for token in processor(logits.clone(), params).argmax(-1)]


def params_of(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return {**forcing_params(*args, **kwargs), REQUEST_FIELD: Request()}


def log_probability(logits: list[float], token: int) -> float:
    top = max(logits)
    return logits[token] - top - math.log(sum(math.exp(value - top) for value in logits))


def write_logprobs(path: Path, logits: torch.Tensor) -> None:
    """Store distributions as a reference request does, by a direct computation in double precision."""
    rows = [[log_probability(step, token) for token in range(VOCAB)] for step in logits.double().tolist()]
    np.array(rows, np.float32).tofile(path)


@pytest.fixture
def logits(seed: int) -> torch.Tensor:
    return 4 * torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_a_free_request_answers_greedily_and_its_distributions_are_stored(tmp_path: Path, logits: torch.Tensor) -> None:
    params = params_of(6, tmp_path / "record.npy", write_logprobs=tmp_path / "logprobs.f32")
    answer = [call(step[None], [params])[0] for step in logits]
    assert answer == logits.argmax(-1).tolist()
    stored = np.fromfile(tmp_path / "logprobs.f32", np.float32).reshape(6, VOCAB)
    write_logprobs(tmp_path / "expected.f32", logits)
    np.testing.assert_allclose(stored.ravel(), np.fromfile(tmp_path / "expected.f32", np.float32), atol=1e-5)
    record = read_record(tmp_path / "record.npy", answer)
    assert record["top"].tolist() == answer
    assert np.isnan(record["kl"]).all() and (record["reference_top"] == -1).all()


def test_a_forced_request_is_compared_with_the_stored_distributions(
    tmp_path: Path, logits: torch.Tensor, rng: random.Random
) -> None:
    reference = 4 * torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    write_logprobs(tmp_path / "logprobs.f32", reference)
    tokens = [rng.randrange(VOCAB) for _ in range(6)]
    params = params_of(6, tmp_path / "record.npy", tokens=tokens, read_logprobs=tmp_path / "logprobs.f32")
    assert [call(step[None], [params])[0] for step in logits] == tokens
    record = read_record(tmp_path / "record.npy", tokens)
    for step, (full, compressed) in enumerate(zip(reference.double().tolist(), logits.double().tolist(), strict=True)):
        p, q = ([log_probability(row, token) for token in range(VOCAB)] for row in (full, compressed))
        kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        assert record["kl"][step] == pytest.approx(kl, abs=1e-5)
        assert record["nll"][step] == pytest.approx(-q[tokens[step]], abs=1e-5)
        assert record["reference_nll"][step] == pytest.approx(-p[tokens[step]], abs=1e-5)
        assert record["top"][step] == q.index(max(q)) and record["reference_top"][step] == p.index(max(p))


def test_equal_distributions_have_no_divergence(tmp_path: Path, logits: torch.Tensor) -> None:
    write_logprobs(tmp_path / "logprobs.f32", logits)
    tokens = logits.argmax(-1).tolist()
    params = params_of(6, tmp_path / "record.npy", tokens=tokens, read_logprobs=tmp_path / "logprobs.f32")
    for step in logits:
        call(step[None], [params])
    record = read_record(tmp_path / "record.npy", tokens)
    assert np.abs(record["kl"]).max() < 1e-5 and (record["top"] == record["reference_top"]).all()


def test_requests_of_a_batch_keep_to_their_own_scripts(tmp_path: Path, logits: torch.Tensor) -> None:
    """Rows come and go and change places; rows without a script are left alone."""
    first = params_of(3, tmp_path / "first.npy", tokens=[7, 8, 9])
    second = params_of(2, tmp_path / "second.npy", tokens=[11])
    greedy = logits.argmax(-1).tolist()
    assert call(logits[:2], [first, None]) == [7, greedy[1]]
    assert call(logits[:3], [second, {"other": 1}, first]) == [11, greedy[1], 8]
    assert call(logits[3:5], [first, second]) == [9, greedy[4]]
    # One more call after the last step, as under overlap scheduling, changes nothing.
    assert call(logits[4:6], [first, second]) == [greedy[4], greedy[5]]
    assert read_record(tmp_path / "first.npy", [7, 8, 9])["token"].tolist() == [7, 8, 9]
    assert read_record(tmp_path / "second.npy", [11, greedy[4]])["top"].tolist() == [greedy[0], greedy[4]]


def test_rows_without_a_script_keep_their_logits(logits: torch.Tensor) -> None:
    assert torch.equal(ForcingProcessor()(logits.clone(), [None] * 6), logits)


def test_banned_tokens_are_passed_over_but_stay_in_the_record(tmp_path: Path, logits: torch.Tensor) -> None:
    order = logits[0].argsort(descending=True).tolist()
    params = params_of(2, tmp_path / "record.npy", tokens=[order[0]], banned=order[:2])
    assert [call(logits[:1], [params])[0] for _ in range(2)] == [order[0], order[2]]
    record = read_record(tmp_path / "record.npy", [order[0], order[2]])
    assert record["top"].tolist() == [order[0]] * 2
    assert record["nll"][1] == pytest.approx(-log_probability(logits[0].double().tolist(), order[2]), abs=1e-5)


def test_a_record_of_another_answer_is_refused(tmp_path: Path, logits: torch.Tensor) -> None:
    """A call too many at the start, as for a prompt prefilled in pieces, shifts the script: it must be noticed."""
    params = params_of(3, tmp_path / "record.npy", tokens=[1, 2, 3])
    with pytest.raises(ValueError, match="was not written"):
        read_record(tmp_path / "record.npy", [])
    answer = [call(logits[:1], [params])[0] for _ in range(4)][1:]
    with pytest.raises(ValueError, match="--chunked-prefill-size -1"):
        read_record(tmp_path / "record.npy", answer)


def test_impossible_tokens_of_the_reference_add_nothing() -> None:
    reference = torch.tensor([0.5, 0.5, 0.0]).log()
    assert kl_divergence(reference, torch.tensor([0.25, 0.25, 0.5]).log()) == pytest.approx(math.log(2), abs=1e-6)
    assert kl_divergence(reference, torch.tensor([0.5, 0.5, 0.0]).log()) == pytest.approx(0, abs=1e-6)
