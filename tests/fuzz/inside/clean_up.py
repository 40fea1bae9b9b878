"""The end of a schedule with named prefixes: all that are still there are deleted, as a client would."""

from typing import Any

from tests.fuzz.schedule import FuzzRequest, Schedule, rid_of

# Of the request that asks which there are; those that delete them follow.
FIRST_INDEX = 900


class CleanUp:
    """Requests of its own, sent once all others are answered."""

    def __init__(self, number: int, schedule: Schedule) -> None:
        self._number = number
        self._is_needed = any(request.asks("create") for request in schedule.requests)
        self._num_sent = 0

    def is_done(self, infos: dict[str, dict[str, Any]]) -> bool:
        """Return whether nothing is left to be sent; ask it once what was sent is answered."""
        return not self._is_needed or (self._num_sent > 0 and self._num_sent == 1 + len(self._listed(infos)))

    def next(self, infos: dict[str, dict[str, Any]]) -> list[tuple[str, FuzzRequest]]:
        """Return what is to be sent now, with its ids: the question, then what deletes the prefixes."""
        asked = [{"delete": one["name"]} for one in self._listed(infos)] if self._num_sent else [{"list": True}]
        first, self._num_sent = FIRST_INDEX + self._num_sent, self._num_sent + len(asked)
        requests = [FuzzRequest(prompt=(5,), max_new_tokens=1, prefix=prefix) for prefix in asked]
        return [(rid_of(self._number, first + i), request) for i, request in enumerate(requests)]

    def _listed(self, infos: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = infos.get(rid_of(self._number, FIRST_INDEX), {}).get("kv_prefix", [])
        return listed
