"""A logit processor for benchmarks: it writes a request's tokens for it and records what the model would have said.

It runs inside SGLang's scheduler, on the logits of the very forward pass that is being judged. Start the server with
``--enable-custom-logit-processor``, give a request ``ForcingProcessor.to_str()`` as its ``custom_logit_processor`` and
``forcing_params(...)`` in its ``custom_params``; greedy sampling does the rest. The record is on disk before the last
token is answered.

Steps are counted per request by the calls of the processor, because under overlap scheduling the request's output ids
lag behind. That count is right while every call samples one token: prompts must be prefilled in one piece
(``--chunked-prefill-size -1``). ``read_record`` compares it with the answer, so a slip cannot go unnoticed. One
process computes the logits: no tensor parallelism.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

FIELD = "forcing"
REQUEST_FIELD = "__req__"
RECORDER_ATTRIBUTE = "forcing_recorder"
# One entry a step. token: what was answered. top: what the model finds most likely. nll: of the token, in nats.
# Against stored distributions: kl from them to the model's, in nats, and their own top and nll; else NaN and -1.
RECORD = np.dtype(
    [
        ("token", np.int64),
        ("top", np.int64),
        ("nll", np.float64),
        ("kl", np.float64),
        ("reference_top", np.int64),
        ("reference_nll", np.float64),
    ]
)


def forcing_params(
    num_steps: int,
    record: Path,
    *,
    tokens: Sequence[int] = (),
    banned: Sequence[int] = (),
    write_logprobs: Path | None = None,
    read_logprobs: Path | None = None,
) -> dict[str, Any]:
    """Return what to put into a request's ``custom_params``.

    Args:
        num_steps: Tokens that the request generates; its ``max_new_tokens``, with ``ignore_eos``.
        record: File for the record, an array of ``RECORD``, ``[num_steps]``.
        tokens: Tokens to answer at the first steps; after them the model goes on greedily.
        banned: Tokens that it then passes over, such as the end of an answer; the record's distributions keep them.
        write_logprobs: File for the log-probabilities of every step, ``[num_steps, vocab_size]``, float32.
        read_logprobs: Such a file, whose first ``num_steps`` steps the model is compared with.
    """
    return {
        FIELD: {
            "num_steps": num_steps,
            "record": str(record.absolute()),
            "tokens": list(tokens),
            "banned": list(banned),
            "write": str(write_logprobs.absolute()) if write_logprobs else None,
            "read": str(read_logprobs.absolute()) if read_logprobs else None,
        }
    }


def read_record(path: Path, output_ids: Sequence[int]) -> np.ndarray:
    """Return the record of a finished request, ``[num_steps]`` of ``RECORD``.

    Raises:
        ValueError: The processor did not see every token of the answer exactly once and in order.
    """
    if not path.exists():
        raise ValueError(f"{path} was not written: the request ended before its last step")
    record: np.ndarray = np.load(path)
    if record["token"].tolist() != list(output_ids):
        raise ValueError(
            f"{path} is not a record of the answer: a prompt was prefilled in pieces or the request was retracted; "
            "give the server --chunked-prefill-size -1 and a larger --max-total-tokens"
        )
    return record


def kl_divergence(reference: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || model) in nats over the last dimension, float64, from log-probabilities.

    Tokens of reference probability 0 add nothing, whatever the model gives them.
    """
    terms = reference.exp() * (reference - logprobs)
    return torch.where(reference == -torch.inf, 0, terms).sum(-1, dtype=torch.float64)


class Recorder:
    """One request's script and record. Lives on the request and advances one step a call."""

    def __init__(self, params: dict[str, Any], vocab_size: int) -> None:
        self.tokens: list[int] = params["tokens"]
        self.banned = torch.tensor(params["banned"], dtype=torch.int64)
        self.record = np.zeros(params["num_steps"], RECORD)
        self.path = params["record"]
        self.step = 0
        shape = (params["num_steps"], vocab_size)
        self.written = np.memmap(params["write"], np.float32, "w+", shape=shape) if params["write"] else None
        self.reference = np.memmap(params["read"], np.float32, "r", shape=shape) if params["read"] else None

    @property
    def done(self) -> bool:
        """Under overlap scheduling one more step may be computed, and thrown away, after the last."""
        return self.step == len(self.record)

    def take(self, logprobs: torch.Tensor) -> int:
        """Record one step and return the token to answer.

        Args:
            logprobs: The model's log-probabilities of that step, ``[vocab_size]``, float32, on the CPU.
        """
        if self.step < len(self.tokens):
            token = self.tokens[self.step]
        else:
            token = int(logprobs.index_fill(0, self.banned, -torch.inf).argmax())
        kl, reference_top, reference_nll = np.nan, -1, np.nan
        if self.reference is not None:
            # A copy, because torch wants memory that it may write.
            reference = torch.from_numpy(np.array(self.reference[self.step]))
            kl = float(kl_divergence(reference, logprobs))
            reference_top, reference_nll = int(reference.argmax()), -float(reference[token])
        if self.written is not None:
            self.written[self.step] = logprobs.numpy()
        self.record[self.step] = (
            token,
            int(logprobs.argmax()),
            -float(logprobs[token]),
            kl,
            reference_top,
            reference_nll,
        )
        self.step += 1
        if self.done:
            self._finish()
        return token

    def _finish(self) -> None:
        # Neither is needed again, and the request may live on for a while.
        self.written = self.reference = None
        with open(self.path, "wb") as file:
            np.save(file, self.record)


class ForcingProcessor(CustomLogitProcessor):  # type: ignore[misc]  # SGLang is checked as Any
    """Puts each request's own script into force; SGLang makes a new one for every batch, so it holds no state."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any] | None] | None = None
    ) -> torch.Tensor:
        """Return ``logits``, ``[bs, vocab_size]``, with every token but the answered one at minus infinity."""
        logprobs = torch.log_softmax(logits.float(), dim=-1).cpu()
        for row, params in enumerate(custom_param_list or ()):
            recorder = _recorder_of(params, logits.shape[-1])
            if recorder is not None and not recorder.done:
                token = recorder.take(logprobs[row])
                logits[row] = -torch.inf
                logits[row, token] = 0
        return logits


def _recorder_of(params: dict[str, Any] | None, vocab_size: int) -> Recorder | None:
    if params is None or FIELD not in params:
        return None
    request = params[REQUEST_FIELD]
    recorder: Recorder | None = getattr(request, RECORDER_ATTRIBUTE, None)
    if recorder is None:
        recorder = Recorder(params[FIELD], vocab_size)
        setattr(request, RECORDER_ATTRIBUTE, recorder)
    return recorder
