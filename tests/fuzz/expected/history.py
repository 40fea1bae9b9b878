"""Which named prefixes there must have been when: from what was sent in which order, and from how it was answered."""

from typing import Any

from rkv_sglang.sizes.pages import ceil_to_page
from tests.fuzz.schedule import FuzzRequest, Schedule, rid_of

TAKEN = ("is there already: take another name", "is being made: take another name")
UNKNOWN, UNMADE = "is unknown here", "is being made: ask again"
GONE = "was deleted while the request waited"
# Said of a request that was ended while its grammar was made; SGLang then has it generate a token after another prompt.
ENDED_BEFORE_ITS_GRAMMAR = "Aborted by AbortReq."
NO_ROOM = ("does not fit the KV pool of", "cannot be made: the KV pool is full", "and named prefixes hold")


class History:
    """One schedule's requests about prefixes, in the order in which they were sent, each judged by those before it.

    Attributes:
        problems: What cannot be, one line each.
        makers: Of requests that went on from a prefix, who made it, both as places in the schedule.
        refused: Requests that ended with status 400, as they had to or might.
        gone: Those of them whose prefix was given up while they waited: they may have generated something before.
    """

    def __init__(self, schedule: Schedule, record: dict[str, Any]) -> None:
        self.problems: list[str] = []
        self.makers: dict[int, int] = {}
        self.refused: set[int] = set()
        self.gone: set[int] = set()
        self._requests, self._server, self._record = schedule.requests, schedule.server, record
        # Of each name who made its prefix; names of which nothing is known are in neither.
        self._holders: dict[str, int] = {}
        self._doubtful: set[str] = set()
        # Of each name how many requests were sent before it was last given up.
        self._given_up: dict[str, int] = {}
        self._all_budgets = sum(one.prefix["budget"] for one in schedule.requests if one.asks("create"))
        self._largest = max((self._need(one) for one in schedule.requests), default=0)
        places = {rid_of(record["number"], index): index for index in range(len(schedule.requests))}
        flushes = list(record["flushes"])
        order = [places[rid] for rid in record["sent"] if rid in places]
        for number, index in enumerate(order):
            while flushes and flushes[0] <= number:
                self._flush(flushes.pop(0))
            self._take(number, index)
        for number in flushes:
            self._flush(number)
        for number, index in enumerate(order):
            self._judge_end(number, index)
        for index in sorted(self.refused - self.gone):
            if self._said(index) is not None:
                self._problem(index, "it was refused, and says that it was not")

    def may_be_short(self, index: int) -> bool:
        """Return whether prefixes may have left too little of the pool for all that a request asked for."""
        return self._need(self._requests[index]) + self._all_budgets > self._server.pool

    def maker_of(self, index: int) -> FuzzRequest | None:
        """Return who made the prefix that a request went on from; None if it went on from none."""
        return self._requests[self.makers[index]] if index in self.makers else None

    def held_by(self, index: int) -> int:
        """Return how many slots of a prefix a request went on from."""
        maker = self.maker_of(index)
        return 0 if maker is None else int(maker.prefix["budget"])

    @property
    def may_be_held(self) -> list[int]:
        """What prefixes may hold together at a time, nothing first."""
        sums = {0}
        for budget in (one.prefix["budget"] for one in self._requests if one.asks("create")):
            sums |= {held + budget for held in sums}
        return sorted(sums)

    def _need(self, request: FuzzRequest) -> int:
        """Return an upper bound of the slots that a request takes, with those of a prefix."""
        held = self._all_budgets if request.asks("use") else 0
        grown = max(request.capacity(self._server), self._server.window)
        # A follow-up has the answer before it in front of it.
        before = 0 if not request.continues else self._server.pool
        num_new = request.max_new_tokens if request.no_policy else min(request.max_new_tokens, grown)
        pages = ceil_to_page(len(request.prompt), self._server.page_size) + 2 * self._server.page_size
        return before + held + pages + num_new + 2

    def _rid(self, index: int) -> str:
        return rid_of(self._record["number"], index)

    def _said(self, index: int) -> Any:
        return self._record["infos"].get(self._rid(index), {}).get("kv_prefix")

    def _message(self, index: int) -> str:
        """Return why a request was refused; empty if it was not."""
        end = self._record["outputs"][self._rid(index)]["finish_reason"] or {}
        return str(end.get("message")) if end.get("status_code") == 400 else ""

    def _is_cut(self, index: int) -> bool:
        """Return whether a request was ended in another way than by being refused."""
        end = self._record["outputs"][self._rid(index)]["finish_reason"]
        return end is None or (end["type"] == "abort" and self._message(index) in ("", ENDED_BEFORE_ITS_GRAMMAR))

    def _has_ended(self, index: int, by: int) -> bool:
        """Return whether a request had ended when another was sent."""
        ended = self._record["ended"].get(self._rid(index))
        return ended is not None and ended <= self._record["sent"][self._rid(by)]

    def _problem(self, index: int, what: str) -> None:
        end = self._record["outputs"][self._rid(index)]["finish_reason"]
        self.problems.append(f"request {index}, {self._requests[index].prefix}: {what} ({self._said(index)}, {end})")

    def _flush(self, number: int) -> None:
        for name in {*self._holders, *self._doubtful}:
            self._give_up(name, number)

    def _give_up(self, name: str, number: int) -> None:
        self._holders.pop(name, None)
        self._doubtful.discard(name)
        self._given_up[name] = number

    def _doubt(self, name: str) -> None:
        self._holders.pop(name, None)
        self._doubtful.add(name)

    def _take(self, number: int, index: int) -> None:
        request = self._requests[index]
        if request.garbage or request.prefix is None:
            return
        if request.asks("list"):
            self._take_list(index)
            return
        name = request.prefix if request.asks("use") else next(iter(request.prefix.values()))
        if request.asks("create"):
            self._take_create(index, name)
        elif any(text in self._message(index) for text in (UNKNOWN, UNMADE)):
            self._take_absence(index, name)
        elif request.asks("delete"):
            self._take_delete(number, index, name)
        else:
            self._take_use(index, name)

    def _take_create(self, index: int, name: str) -> None:
        message, said = self._message(index), self._said(index)
        if any(text in message for text in TAKEN):
            self.refused.add(index)
            if name not in self._holders and name not in self._doubtful:
                self._problem(index, "the name was free")
        elif any(text in message for text in NO_ROOM):
            self.refused.add(index)
            if self._all_budgets + self._largest <= self._server.pool:
                self._problem(index, "there was room")
            if NO_ROOM[1] in message:
                self._doubt(name)
        elif said is not None:
            if said != self._requests[index].made:
                self._problem(index, "it made something else")
            if name in self._holders:
                self._problem(index, f"it is of the name of request {self._holders[name]}'s")
            self._holders[name] = index
            self._doubtful.discard(name)
        else:
            # It was ended, or the cache flushed, before it was made.
            self._doubt(name)

    def _take_absence(self, index: int, name: str) -> None:
        self.refused.add(index)
        holder = self._holders.get(name)
        if holder is not None and (UNKNOWN in self._message(index) or self._has_ended(holder, index)):
            self._problem(index, f"there was one, of request {holder}")
        if UNMADE in self._message(index) and holder is None and name not in self._doubtful:
            self._problem(index, "nobody was making one")

    def _take_delete(self, number: int, index: int, name: str) -> None:
        if self._said(index) is None:
            if not self._is_cut(index):
                self._problem(index, "it was not done")
            self._doubt(name)
            return
        if self._said(index) != {"deleted": name}:
            self._problem(index, "it did something else")
        if name not in self._holders and name not in self._doubtful:
            self._problem(index, "there was none")
        self._give_up(name, number)

    def _take_use(self, index: int, name: str) -> None:
        """Note whose prefix it must be; what it says of it is judged."""
        holder, said = self._holders.get(name), self._said(index)
        if holder is None and name in self._doubtful and said is not None:
            made = (i for i, one in enumerate(self._requests) if one.asks("create") and one.made == said)
            holder = next(made, None)
        if holder is not None:
            self.makers[index] = holder
        if said is not None and (holder is None or said != self._requests[holder].made):
            self._problem(index, f"it went on from what was not there, but that of request {holder}")

    def _take_list(self, index: int) -> None:
        said = self._said(index)
        if said is None:
            if not self._is_cut(index):
                self._problem(index, "it says nothing")
            return
        made = {name: self._requests[holder].made for name, holder in self._holders.items()}
        for one in said:
            if one["name"] not in self._doubtful and one != made.get(one["name"]):
                self._problem(index, f"there was no {one}")
        for name, holder in self._holders.items():
            if self._has_ended(holder, index) and made[name] not in said:
                self._problem(index, f"it lacks {made[name]}")

    def _judge_end(self, number: int, index: int) -> None:
        """Judge what depends on what came later: requests that were ended or refused, and prefixes that never were."""
        request, message = self._requests[index], self._message(index)
        if request.garbage:
            return
        is_silent = self._said(index) is None and not self._is_cut(index)
        if GONE in message:
            self.refused.add(index)
            self.gone.add(index)
            is_given_up = request.asks("use") and self._given_up.get(request.prefix, -1) >= number
            if not is_given_up and not self._doubtful:
                self._problem(index, "the prefix was there all the time")
        elif NO_ROOM[2] in message:
            self.refused.add(index)
            if not self.may_be_short(index):
                self._problem(index, "there was room")
        elif is_silent and index not in self.refused and request.asks("use"):
            self._problem(index, "it does not say what it went on from")
        elif is_silent and index not in self.refused and request.asks("create"):
            # While it was made the cache may have been flushed.
            is_flushed = any(flushed > number for flushed in self._record["flushes"])
            self.problems += [] if is_flushed else [f"request {index}, {request.prefix}: it made nothing"]
