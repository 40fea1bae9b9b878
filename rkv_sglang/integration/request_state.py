"""Where a request carries what the policy remembers of it."""

from __future__ import annotations

from typing import Any

from rkv_sglang.sizes.lengths import RequestState

# SGLang's Req is a plain class.
STATE_ATTRIBUTE = "rkv_state"


def known_state_of(req: Any) -> RequestState | None:
    """Return the state of a request; None if the policy has not looked at it yet."""
    state: RequestState | None = getattr(req, STATE_ATTRIBUTE, None)
    return state
