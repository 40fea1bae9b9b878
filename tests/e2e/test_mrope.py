"""Positions of three numbers (mrope): they count every token ever seen, with the offset that an image has brought."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from devtools.tiny_models import IMAGE_MODEL, IMAGE_TOKEN_ID, tiny_model_path
from tests.e2e.workload import Setting, assert_same_tokens, greedy, masked_oracle, outputs_at_restores, six_prompts
from tests.support.harness.gate import Control
from tests.support.harness.messages import image_inputs
from tests.support.harness.scheduler import rid_of, run_scheduler
from tests.support.oracle.dense import dense_generate
from tests.support.oracle.images import Image

# Patches of an image, by twos an embedding: so many rows and columns of these.
GRID, ROWS, COLUMNS = (1, 6, 8), 3, 4
PAUSE, RESTORES = 85, range(84, 99)


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


@pytest.mark.parametrize("granularity", ["gather", "drop"])
def test_tokens_equal_those_of_a_model_with_the_positions_of_all_tokens(granularity, embeddings):
    # The second shares its prefix and the image with the first; the third is text alone.
    prompts = [with_image(six_prompts()[0]), with_image(six_prompts()[1]), list(six_prompts()[4])]
    flags, controls = ["--model-path", str(tiny_model_path(IMAGE_MODEL))], []
    if granularity == "gather":
        setting = Setting(budget=37, buffer=23)
        # The first is taken out once it has seen more than the pool holds, after its second compaction, and longer
        # before the third than it takes to have its queries: so it comes back with what it had kept, and no answer
        # changes. One at a time, because two would not fit.
        flags += ["--page-size", "16", "--max-total-tokens", "176"]
        first_seen = (rid_of(0), PAUSE)
        controls = [
            Control(0, "PauseGenerationReqInput", {"mode": "retract"}, after_tokens=first_seen),
            Control(0, "ContinueGenerationReqInput", {"torch_empty_cache": False}, wait=3),
        ]
    else:
        setting = Setting(budget=43, buffer=32, policy="random_attention", block=16)
    num_tokens = setting.budget + 3 * setting.buffer + 5
    requests = [
        request_of(prompt, num_tokens, embeddings, when_idle=granularity == "gather" or i == 1)
        for i, prompt in enumerate(prompts)
    ]
    # Prompts with images stay whole, whatever is asked.
    flags += ["--kv-prompt-budget", "40"]
    result = run_scheduler([*flags, *setting.flags], requests, controls=controls)
    result.assert_clean()
    assert result.outputs[1].cached_tokens >= 64
    restores = outputs_at_restores(result, rid_of(0))
    assert len(restores) == len(controls) // 2 and all(number in RESTORES for number in restores)
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        expected = masked_oracle(Model(prompt, embeddings), prompt, setting, output.output_ids)
        assert len(output.output_ids) == num_tokens and len(expected.compactions) == 3
        assert_same_tokens(output.output_ids, expected, f"request {i}")
        assert output.info["kv_prompt_tokens"] == len(prompt)


def test_an_answer_that_comes_back_is_compacted_and_images_always_stay(embeddings):
    setting, path = Setting(budget=21, buffer=12), tiny_model_path(IMAGE_MODEL)
    prompt, num_tokens, carried = with_image(six_prompts()[5]), 150, 60
    image = Image(prompt.index(IMAGE_TOKEN_ID), COLUMNS, embeddings)
    sizes = {"budget": setting.budget, "buffer": setting.buffer, "window": setting.window, "score": setting.score}
    whole = dense_generate(path, prompt, num_tokens, **sizes, recompute_at=(carried,), image=image)
    came_back = [*prompt, *whole.output_ids[:carried]]
    end = image.first + image.num_tokens
    requests = []
    for mark in (len(prompt), end, end - 1):
        request = greedy(came_back, num_tokens - carried, extra={"mm_inputs": image_inputs(image, len(came_back))})
        request.sampling_params["custom_params"] = {"kv_prompt_len": mark}
        requests.append(request)
    # SGLang refuses it for its length, and leaves a token of it; that reason is what its client is told.
    too_long = greedy(came_back * 3, 9, extra={"mm_inputs": image_inputs(image, 3 * len(came_back))})
    too_long.sampling_params["custom_params"] = {"kv_prompt_len": len(prompt)}
    flags = ["--model-path", str(path), "--max-total-tokens", "256", *setting.flags]
    result = run_scheduler(flags, [*requests, too_long])
    result.assert_clean()
    *outputs, refused, longest = result.outputs
    assert longest.finish_reason["message"].startswith("Multimodal prompt is too long")
    for mark, output in zip((len(prompt), end), outputs, strict=True):
        rest = came_back[mark:]
        expected = dense_generate(
            path, came_back[:mark], len(output.output_ids), **sizes, carried_ids=rest, image=image
        )
        assert_same_tokens(output.output_ids, expected, f"marked at {mark}")
        assert len(output.output_ids) == num_tokens - carried and len(expected.compactions) > 2
        assert output.info["kv_prompt_tokens"] == mark
    assert refused.finish_reason["type"] == "abort" and refused.finish_reason["status_code"] == 400
    assert refused.finish_reason["message"] == (
        f"kv_prompt_len {end - 1} leaves an image behind the prompt, and images always stay: set it to {end} or more, "
        "or leave it out"
    )
