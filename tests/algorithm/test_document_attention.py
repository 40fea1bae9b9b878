"""Attention that a document receives, in any pieces and any working memory, against one row after another."""

import random

import pytest
import torch

from rkv_sglang.algorithm import document_attention
from rkv_sglang.algorithm.document_attention import add_attention
from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.config import BY_REPEAT, BY_TASK
from tests.support.oracle.judges import repeat_scores, task_scores
from tests.support.oracle.scores import ScoreInputs

HEAD_DIM = 8


@pytest.mark.parametrize("_round", range(3))
@pytest.mark.parametrize("judge", [BY_TASK, BY_REPEAT])
def test_scores_are_those_of_single_rows_whatever_the_pieces(judge, _round, seed, rng: random.Random, monkeypatch):
    torch.manual_seed(seed)
    monkeypatch.setattr(document_attention, "REPEAT_CHUNK", 11)
    num_kv_heads, group_size = rng.choice([(1, 3), (2, 2), (2, 1)])
    length = rng.randint(5, 37)
    num_between = rng.randint(0, 6) if judge == BY_REPEAT else 0
    num_judging = length if judge == BY_REPEAT else rng.randint(1, 9)
    input_len = length + num_between + num_judging
    keys = torch.randn(num_kv_heads, input_len, HEAD_DIM)
    queries = 2 * torch.randn(num_judging, num_kv_heads * group_size, HEAD_DIM)
    scale = rng.choice([None, 0.3])
    # Down to one query and one key at a time.
    monkeypatch.setattr(document_attention, "JUDGING_BYTES", rng.choice([1, 1000, 4000, 2**20]))

    scores, place = torch.zeros(num_kv_heads, length), input_len - num_judging
    while place < input_len:
        own = queries[place - input_len :][: rng.choice([1, 5, 17, 100])]
        model = ModelAttention(logit_scale=scale)
        add_attention(scores, judge, own, place, input_len, lambda head, places: keys[head, places], model)
        place += len(own)

    inputs = ScoreInputs(keys, keys, queries.transpose(0, 1), torch.empty(0), 0, logit_scale=scale)
    expected = (
        task_scores(inputs, length=length) if judge == BY_TASK else repeat_scores(inputs, length=length, chunk=11)
    )
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_logits_are_capped_as_the_model_caps_them(seed):
    torch.manual_seed(seed)
    keys, queries = 9 * torch.randn(1, 7, HEAD_DIM), torch.randn(1, 1, HEAD_DIM)
    scores = torch.zeros(1, 6)
    model = ModelAttention(logit_scale=0.5, logit_cap=2.0)
    add_attention(scores, BY_TASK, queries, 6, 7, lambda head, places: keys[head, places], model)
    logits = 2.0 * (0.5 * keys[0] @ queries[0, 0] / 2.0).tanh()
    torch.testing.assert_close(scores[0], 7 * logits.softmax(dim=0)[:6])


def test_a_piece_works_in_bounded_memory(monkeypatch):
    length, num_judging = 3000, 1000
    sizes = []

    def read_keys(head: int, places: torch.Tensor) -> torch.Tensor:
        sizes.append(places.numel() * HEAD_DIM * 8)
        return torch.zeros(len(places), HEAD_DIM)

    monkeypatch.setattr(document_attention, "JUDGING_BYTES", 2**17)
    empty, numbers = torch.Tensor.new_empty, []
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda own, *shape: numbers.append(shape) or empty(own, *shape))
    scores, queries = torch.zeros(1, length), torch.zeros(num_judging, 2, HEAD_DIM)
    add_attention(scores, BY_TASK, queries, length, length + num_judging, read_keys, ModelAttention())
    assert max(sizes) <= 2**17 and max(rows * keys * 16 for rows, keys in numbers) <= 2**17
