"""Positions of three numbers (mrope): they count every token ever seen, with the offset that an image has brought."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from devtools.tiny_models import IMAGE_MODEL, IMAGE_TOKEN_ID, tiny_model_path
from tests.e2e.workload import Setting, greedy, outputs_at_restores, retracting, six_prompts
from tests.support.harness.scheduler import rid_of, run_scheduler
from tests.support.oracle.masked_compact import MaskedResult, masked_compact

# Patches of an image, by twos an embedding: so many rows and columns of these.
GRID, ROWS, COLUMNS = (1, 6, 8), 3, 4


class Model:
    """The language part, with an image's embeddings in their place: called as a transformers model is."""

    def __init__(self, prompt: list[int], embeddings: torch.Tensor) -> None:
        self._model = load_image_model()
        self.config = self._model.config
        self._embeddings, self._is_image = embeddings, torch.tensor(prompt) == IMAGE_TOKEN_ID
        grids = torch.tensor([GRID]) if bool(self._is_image.any()) else None
        kinds = self._is_image.int()[None]
        self.positions, self.delta = self._model.model.get_rope_index(
            torch.tensor([prompt]), mm_token_type_ids=kinds, image_grid_thw=grids
        )

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> Any:
        embeddings = self._model.get_input_embeddings()(ids)
        embeddings[0, : len(self._is_image)][self._is_image] = self._embeddings[: int(self._is_image.sum())]
        later = torch.arange(self.positions.shape[2], ids.shape[1]) + self.delta
        positions = torch.cat([self.positions, later.expand(3, 1, -1)], dim=2)
        hidden = self._model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, use_cache=use_cache
        ).last_hidden_state
        return SimpleNamespace(logits=self._model.lm_head(hidden))


def load_image_model() -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(tiny_model_path(IMAGE_MODEL), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def embeddings() -> torch.Tensor:
    return torch.randn(ROWS * COLUMNS, 128, generator=torch.Generator().manual_seed(3))


def with_image(prompt: tuple[int, ...]) -> list[int]:
    return [*prompt[:6], IMAGE_TOKEN_ID - 2, *[IMAGE_TOKEN_ID] * (ROWS * COLUMNS), IMAGE_TOKEN_ID - 3, *prompt[6:]]


def request_of(prompt: list[int], num_tokens: int, embeddings: torch.Tensor, **fields: Any) -> Any:
    places = [i for i, token in enumerate(prompt) if token == IMAGE_TOKEN_ID]
    if not places:
        return greedy(prompt, num_tokens, **fields)
    model = Model(prompt, embeddings)
    item = {
        "format": "PRECOMPUTED_EMBEDDING",
        "precomputed_embeddings": embeddings.numpy(),
        "offsets": [(places[0], places[-1])],
        "model_specific_data": {"image_grid_thw": np.array([GRID])},
    }
    mm_inputs = {
        "mm_items": [item],
        "im_token_id": IMAGE_TOKEN_ID,
        "mrope_positions": model.positions[:, 0].numpy(),
        "mrope_position_delta": model.delta.numpy(),
    }
    return greedy(prompt, num_tokens, extra={"mm_inputs": mm_inputs}, **fields)


def expected_of(prompt: list[int], num_tokens: int, embeddings: torch.Tensor, setting: Setting) -> MaskedResult:
    return masked_compact(
        Model(prompt, embeddings),
        prompt,
        num_tokens,
        budget=setting.budget,
        buffer=setting.buffer,
        window=setting.window,
        score=setting.score,
        block=setting.block,
    )


@pytest.mark.parametrize(
    ("setting", "flags"),
    [
        (Setting(budget=37, buffer=23), ["--page-size", "16"]),
        (Setting(budget=43, buffer=32, policy="random_attention", block=16), []),
    ],
    ids=["gather", "drop"],
)
def test_tokens_equal_those_of_a_model_with_the_positions_of_all_tokens(setting, flags, embeddings):
    num_tokens = setting.budget + 3 * setting.buffer + 5
    # The second shares its prefix and the image with the first; the third is text alone.
    prompts = [with_image(six_prompts()[1]), with_image(six_prompts()[2]), list(six_prompts()[4])]
    requests = [request_of(prompt, num_tokens, embeddings, when_idle=i == 1) for i, prompt in enumerate(prompts)]
    flags = ["--model-path", str(tiny_model_path(IMAGE_MODEL)), *flags, *setting.flags]
    result = run_scheduler(flags, requests)
    result.assert_clean()
    assert result.outputs[1].cached_tokens >= 64
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        expected = expected_of(prompt, num_tokens, embeddings, setting)
        assert len(expected.compactions) == 3
        differs = [n for n in range(num_tokens) if output.output_ids[n] != expected.output_ids[n]]
        assert not differs, f"request {i}: token {differs[0]}, the oracle's gap {expected.logit_gaps[differs[0]]}"


def test_a_restored_request_goes_on_at_its_positions(embeddings):
    setting, (num_slots, interval) = Setting(budget=24, buffer=16), (182, 157)
    prompts = [with_image(six_prompts()[4]), list(six_prompts()[5][:22]), list(six_prompts()[3][:10])]
    num_tokens = interval + 50
    flags = ["--model-path", str(tiny_model_path(IMAGE_MODEL)), "--max-total-tokens", str(num_slots), *setting.flags]
    requests = [request_of(prompt, num_tokens, embeddings) for prompt in prompts]
    result = run_scheduler(flags, requests, env=retracting(interval))
    result.assert_clean()
    assert any(outputs_at_restores(result, rid_of(i)) for i in range(3))
    assert all(len(output.output_ids) == num_tokens for output in result.outputs)
