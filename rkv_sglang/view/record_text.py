"""Traces of what stayed of a text in the KV cache: of a prompt, or of the document of a named prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rkv_sglang.client.server import answered, raise_refusal, server_info
from rkv_sglang.client.tokens import Tokenizer
from rkv_sglang.messages import shown
from rkv_sglang.view.record import ANSWER_TIMEOUT_S, NO_POLICY_TO_SEE
from rkv_sglang.view.token_text import token_texts
from rkv_sglang.view.trace import PROMPT, Trace


def record_prompt(
    server: str, prompt: str, *, budget: int, max_new_tokens: int, temperature: float, api_key: str | None = None
) -> Trace:
    """Have an answer generated, and return what was kept of the prompt.

    Args:
        server, prompt, api_key: As in ``record``.
        budget: Tokens of the prompt that are kept.

    Raises:
        ValueError: There is no such server, it keeps or records nothing, it refuses the request, or its answer makes no
            sense; one line.
    """
    server = server.rstrip("/")
    info = server_info(server, api_key, without=NO_POLICY_TO_SEE)
    tokenizer = Tokenizer(server, api_key, info)
    ids = tokenizer.ids(prompt, special=True)
    custom = {"kv_trace": True, "kv_prompt_budget": budget}
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "custom_params": custom}
    payload = {"input_ids": ids, "sampling_params": sampling}
    answer = answered(server, "/generate", payload, ANSWER_TIMEOUT_S, api_key)
    try:
        raise_refusal(answer)
        meta_info = answer["meta_info"]
        if "kv_trace" in meta_info and PROMPT not in meta_info["kv_trace"]:
            raise ValueError(
                f"{server} left the prompt of {len(ids)} tokens whole: set --prompt-budget below that, and let the "
                f"answer have more than {info['kv_window']} tokens"
            )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{server} answers unlike SGLang with rkv_sglang ({shown(error)} in its answer)") from error
    return text_trace(server, PROMPT, info, meta_info, ids, tokenizer)


def text_trace(
    server: str,
    subject: str,
    info: Mapping[str, Any],
    meta_info: Mapping[str, Any],
    ids: Sequence[int],
    tokenizer: Tokenizer,
) -> Trace:
    """Return what an answer says that was kept of a text.

    Args:
        server: What to call the server in a message.
        subject: What the text is; its record stands in the answer's ``kv_trace`` under this name.
        info: The server's ``/server_info``.
        meta_info: Of the answer.
        ids: The text's tokens.

    Raises:
        ValueError: Nothing was recorded, or the record makes no sense; one line.
    """
    if "kv_trace" not in meta_info:
        raise ValueError(f"{server} recorded nothing: start it with --kv-policy rkv --kv-trace")
    pieces, text = tokenizer.pieces(ids)
    try:
        recorded = meta_info["kv_trace"]
        return Trace(
            subject=subject,
            model=info["model_path"],
            policy=meta_info["kv_policy"],
            budget=meta_info["kv_prompt_tokens"] if subject == PROMPT else meta_info["kv_prefix"]["budget"],
            buffer=info["kv_buffer"],
            window=info["kv_window"],
            tp_size=info["tp_size"],
            prompt="",
            prompt_len=0,
            num_layers=recorded["num_layers"],
            num_kv_heads=recorded["num_kv_heads"],
            tokens=token_texts(pieces, text),
            token_ids=list(ids),
            compactions=[recorded[subject]],
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{server} answers unlike SGLang with rkv_sglang ({shown(error)} in its answer)") from error
