"""What goes to a scheduler and what comes back, in SGLang's own messages."""

import array
from typing import Any

import numpy as np
import torch

from devtools.tiny_models import IMAGE_TOKEN_ID
from tests.support.oracle.images import Image


def generate_message(rid: str, request: Any, tokenizer: Any = None) -> Any:
    """Return the message of a request; stop strings and ``min_new_tokens`` need the ``tokenizer``."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling_params = SamplingParams(**{"temperature": 0.0, **request.sampling_params})
    sampling_params.normalize(tokenizer)
    fields: dict[str, Any] = {
        "input_text": None,
        "input_ids": array.array("q", request.input_ids),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "return_logprob": request.return_logprob,
        "logprob_start_len": request.logprob_start_len,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
    }
    extra = dict(request.extra)
    if extra.get("mm_inputs") is not None:
        extra["mm_inputs"] = _image_inputs(extra["mm_inputs"])
    return TokenizedGenerateReqInput(rid=rid, sampling_params=sampling_params, **{**fields, **extra})


def _image_inputs(parts: dict[str, Any]) -> Any:
    """Return what SGLang's processor would make of images that are embedded already."""
    from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalProcessorOutput

    def as_tensors(fields: dict[str, Any]) -> dict[str, Any]:
        # Arrays, because tensors go from process to process by way of a server of their own.
        return {name: torch.tensor(own) if isinstance(own, np.ndarray) else own for name, own in fields.items()}

    items = [
        MultimodalDataItem.from_dict(
            as_tensors({"modality": "IMAGE", **item, "model_specific_data": as_tensors(item["model_specific_data"])})
        )
        for item in parts["mm_items"]
    ]
    return MultimodalProcessorOutput.from_dict(as_tensors({**parts, "mm_items": items}))


def image_inputs(image: Image, prompt_len: int) -> dict[str, Any]:
    """Return what ``Request.extra`` has under ``mm_inputs`` for a prompt of so many tokens with this image."""
    rows = image.num_tokens // image.columns
    item = {
        "format": "PRECOMPUTED_EMBEDDING",
        "precomputed_embeddings": image.embeddings.numpy(),
        "offsets": [(image.first, image.first + image.num_tokens - 1)],
        # Patches, by twos an embedding.
        "model_specific_data": {"image_grid_thw": np.array([(1, 2 * rows, 2 * image.columns)])},
    }
    return {
        "mm_items": [item],
        "im_token_id": IMAGE_TOKEN_ID,
        "mrope_positions": image.positions_of(torch.arange(prompt_len)).numpy(),
        "mrope_position_delta": np.array([[image.delta]]),
    }


def empty_output(prompt_tokens: int) -> dict[str, Any]:
    return {
        "output_ids": [],
        "finish_reason": None,
        "cached_tokens": 0,
        "prompt_tokens": prompt_tokens,
        "retractions": 0,
        "output_logprobs": [],
        "input_logprobs": [],
        "info": {},
    }


def take(outputs: dict[str, dict[str, Any]], message: Any, states: list[dict[str, Any]] | None = None) -> None:
    """Add what a message says to the outputs, or to the ``states`` that schedulers were asked for."""
    from sglang.srt.managers.io_struct import (
        AbortReq,
        BatchTokenIDOutput,
        GetInternalStateReqOutput,
        unwrap_from_pickle,
    )

    if isinstance(message, GetInternalStateReqOutput) and states is not None:
        states.append(message.internal_state)
    if isinstance(message, AbortReq):
        # Aborted before it ran.
        outputs[message.rid]["finish_reason"] = message.finished_reason or {"type": "abort", "message": "in the queue"}
    if not isinstance(message, BatchTokenIDOutput):
        return
    info: Any = unwrap_from_pickle(message.customized_info) or {}
    for index, rid in enumerate(message.rids):
        output = outputs[rid]
        # Each message carries what is new since the last one.
        output["output_ids"] += list(message.output_ids[index])
        output["finish_reason"] = message.finished_reasons[index]
        output["cached_tokens"] = message.cached_tokens[index]
        output["retractions"] = message.retraction_counts[index]
        output["info"].update({key: values[index][-1] for key, values in info.items() if values[index]})
        for key, values in (
            ("output_logprobs", message.output_token_logprobs_val),
            ("input_logprobs", message.input_token_logprobs_val),
        ):
            if values and values[index]:
                output[key] += list(values[index])
