"""What is measured of a model's attention is the sparsity of every step of its answers, by the definition."""

import numpy as np
import pytest
import torch

from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.algorithm.modes import between_three_modes
from rkv_sglang.algorithm.thoughts import ONE_KIND
from rkv_sglang.integration.startup.meters import sparsities
from rkv_sglang.integration.startup.meters.sparsities import SparsityMeter
from tests.algorithm.cases import fresh_seed
from tests.support.oracle.thoughts import sparsity_of_layer

NUM_KV_HEADS, GROUP, HEAD_DIM, SCALE = 2, 3, 8, 0.7


def test_every_step_of_an_answer_is_measured_over_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(fresh_seed())
    monkeypatch.setattr(sparsities, "STEPS", 7)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(sparsities, "between_three_modes", lambda samples: seen.append(samples))
    meter = SparsityMeter([1, 4], NUM_KV_HEADS, 0.2, ModelAttention(logit_scale=SCALE))
    expected: list[float] = []
    for prompt_len, num_tokens in ((5, 30), (11, 12)):
        meter.start(prompt_len)
        of_layers = []
        for layer in range(6):
            queries = torch.randn(num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM)
            keys = torch.randn(num_tokens, NUM_KV_HEADS, HEAD_DIM)
            # SGLang may pad what it computes.
            padded = [
                torch.cat([part.flatten(1), torch.full((2, part[0].numel()), torch.nan)]) for part in (queries, keys)
            ]
            meter.add(layer, *padded, torch.arange(num_tokens))
            if layer in (1, 4):
                by_head = queries.unflatten(1, (NUM_KV_HEADS, GROUP)).permute(1, 2, 0, 3).double().numpy()
                of_layers.append(
                    [
                        sparsity_of_layer(
                            by_head[:, :, step : step + 1],
                            keys[: step + 1].transpose(0, 1).double().numpy(),
                            0.2,
                            lambda product: product * SCALE,
                        )
                        for step in range(prompt_len, num_tokens)
                    ]
                )
        expected += np.mean(of_layers, axis=0).tolist()
    assert meter.bounds() == ONE_KIND and meter.counts == {1: 42, 4: 42}
    (samples,) = seen
    assert len(samples) == len(expected) == 26
    # One token more or less of one step, where one lies at the border.
    assert int((samples - torch.tensor(expected)).abs().gt(1e-6).sum()) <= 1


def test_bounds_are_those_between_the_modes_of_what_was_measured() -> None:
    torch.manual_seed(fresh_seed())
    meter = SparsityMeter([0], 1, 0.5, ModelAttention(logit_scale=1.0))
    meter.start(0)
    # A step attends to one token of all, to half of them, or to all alike; one number tells where.
    kind = torch.randint(3, (900,))
    kind[:3] = torch.arange(3)
    keys = torch.stack([torch.ones(900), torch.arange(900) % 2.0, torch.arange(900) == 0], dim=1).float()
    queries = torch.nn.functional.one_hot(kind, 3).float() * 50
    meter.add(0, queries, keys, torch.arange(900))
    low, high = meter.bounds()
    assert 0.1 < low < 0.4 and 0.6 < high < 0.95
    assert between_three_modes(torch.tensor([0.5])) is None
