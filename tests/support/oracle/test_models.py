"""The oracle on models that are more than a plain decoder, against transformers' own modules."""

import pytest
import torch

from devtools.tiny_models import IMAGE_MODEL, IMAGE_TOKEN_ID, SINKS_MODEL, SLIDING, SLIDING_WINDOW, tiny_model_path
from tests.e2e.test_mrope import COLUMNS, ROWS, Model
from tests.e2e.workload import random_ids
from tests.support.oracle.decoder import load_model
from tests.support.oracle.dense import dense_generate
from tests.support.oracle.images import Image
from tests.support.oracle.masked_compact import masked_compact
from tests.support.oracle.policy_scores import score_function


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("name", ["olmo3", SINKS_MODEL])
def test_sliding_windows_and_attention_sinks_are_those_of_transformers(name, block, rng):
    model, prompt = load_model(tiny_model_path(name)), random_ids(rng, rng.randrange(20, 40))
    kinds = model.config.layer_types
    windows = [SLIDING_WINDOW if kind == SLIDING else None for kind in kinds]
    window = SLIDING_WINDOW if block else 4
    sizes = {"budget": window + 16, "buffer": 16, "window": window, "block": block, "score": score_function("snapkv")}
    dense = dense_generate(model, prompt, 90, **sizes)
    num_compared = dense.num_certain_outputs()
    found = masked_compact(model, prompt, 90, **sizes, windows=windows, guessed_output_ids=dense.output_ids)
    assert found.output_ids[:num_compared] == dense.output_ids[:num_compared]
    compacted_at = [compaction.num_outputs for compaction in dense.compactions]
    assert [place for place in found.compactions if place < num_compared] == [
        place for place in compacted_at if place < num_compared
    ]
    assert len(compacted_at) > 1


@pytest.mark.parametrize("first", [0, 7])
def test_an_image_is_where_transformers_has_it(first, rng):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    embeddings = torch.randn(ROWS * COLUMNS, 128, generator=generator)
    text = random_ids(rng, 20, vocab_size=IMAGE_TOKEN_ID)
    prompt = [*text[:first], *[IMAGE_TOKEN_ID] * len(embeddings), *text[first:]]
    image, model = Image(first, COLUMNS, embeddings), Model(prompt, embeddings)
    assert torch.equal(image.positions_of(torch.arange(len(prompt))), model.positions[:, 0])
    assert image.delta == model.delta.item()
    sizes = {"budget": 20, "buffer": 16, "window": 4, "score": score_function("snapkv")}
    dense = dense_generate(tiny_model_path(IMAGE_MODEL), prompt, 80, **sizes, image=image)
    num_compared = dense.num_certain_outputs()
    found = masked_compact(model, prompt, 80, **sizes, guessed_output_ids=dense.output_ids)
    assert found.output_ids[:num_compared] == dense.output_ids[:num_compared]
    assert len(dense.compactions) > 1
