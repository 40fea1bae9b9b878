"""A request of the pool machine, and what it must hold."""

from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req

from rkv_sglang.integration.hooks import restore as hooks


class Wrong(AssertionError):
    """What must never happen, in one line."""


class PolicyReq(Req):
    """A request as SGLang's is once the hooks are applied; here nothing of SGLang is replaced."""

    def _compute_max_prefix_len(self, input_len: int) -> int:
        return hooks.match_prompt_only(Req._compute_max_prefix_len, self, input_len)

    def refresh_fill_ids(self) -> None:
        hooks.keep_resident_ids(Req.refresh_fill_ids, self)

    def reset_for_retract(self) -> None:
        hooks.after_retract(super().reset_for_retract(), self)


@dataclass
class Held:
    """A request and what it must hold.

    Attributes:
        numbers: Of every resident token, ``[num_layers * num_kv_heads, resident]``, int64.
        prompt_len: How many of them are the prompt's.
        seen: Tokens seen, prompt and outputs whose KV is there, evicted ones included.
    """

    req: Any
    numbers: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    prompt_len: int = 0
    seen: int = 0
