"""A plugin of the tests: watches the scheduler of a real SGLang and writes what it sees to a JSON-lines file.

SGLang's own strict checks count slots; they cannot see contents. This one keeps a bitwise copy of them. Active only in
a scheduler process, and only when ``RKV_PROBE_FILE`` names the file to append to (``.rank1`` and so on is added for the
other tensor-parallel ranks). Further settings, all optional:

``RKV_PROBE_MAX_PRIVATE``  most slots a request may hold past its prompt
``RKV_PROBE_MAX_LOCKED``   most slots of the tree that may be locked while the scheduler is idle
``RKV_PROBE_MOVES_NOTHING``  if set, a compaction must not change the bytes of any slot that stays with its request
``RKV_PROBE_FAULT``        a fault to inject on purpose, so that tests can see it found: ``flip_tree@N``,
                           ``flip_private@N`` or ``leak@N``, at the first scheduler step >= N where it is possible

Lines are objects with a key ``event`` (``start``, ``step``, ``compaction``, ``idle``, ``fault``) or ``violation``.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

# How many changed slots one violation lists.
_MAX_LISTED = 8


def _prompt_len(req: Any) -> int:
    """Return how many tokens of a request are its prompt; it may say that the others are an answer that goes on."""
    asked = req.sampling_params.custom_params
    marked = asked.get("kv_prompt_len") if isinstance(asked, dict) else None
    num_tokens = len(req.origin_input_ids)
    # Anything else is refused.
    return marked if type(marked) is int and 1 <= marked <= num_tokens else num_tokens


def register() -> None:
    """Entry point, called by SGLang in every process it starts."""
    if not os.environ.get("RKV_PROBE_FILE"):
        return
    is_scheduler = multiprocessing.parent_process() is not None and "sglang.srt.managers.scheduler" in sys.modules
    if not is_scheduler:
        # Hooking the scheduler imports it, which takes many seconds in a process that has no use for it.
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    HookRegistry.register(f"{scheduler}.__init__", _after_init, HookType.AFTER)
    HookRegistry.register(f"{scheduler}.get_next_batch_to_run", _around_get_next_batch, HookType.AROUND)
    HookRegistry.register(f"{scheduler}.on_idle", _after_idle, HookType.AFTER)
    HookRegistry.register(
        "sglang.srt.managers.schedule_batch.Req.reset_for_retract", _after_reset_for_retract, HookType.AFTER
    )


_probe: "Probe | None" = None


def get_probe() -> "Probe":
    """Return the probe of this scheduler process."""
    assert _probe is not None, "the probe is off, or the scheduler is not built yet"
    return _probe


def _after_init(result: object, scheduler: Any, *args: object, **kwargs: object) -> None:
    global _probe
    _probe = Probe(scheduler)


def _around_get_next_batch(original: Any, scheduler: Any, *args: object, **kwargs: object) -> Any:
    if _probe is None:
        return original(scheduler, *args, **kwargs)
    _probe.before_scheduling()
    plan = original(scheduler, *args, **kwargs)
    _probe.after_scheduling(plan)
    return plan


def _after_idle(result: object, *args: object, **kwargs: object) -> None:
    if _probe is not None:
        _probe.idle()


def _after_reset_for_retract(result: object, *args: object, **kwargs: object) -> None:
    if _probe is not None:
        _probe.num_retractions += 1


class _Held:
    """What the probe last saw of a request that holds KV."""

    def __init__(self, serial: int, req: Any, first_slot: int, restored_prompt_len: int | None) -> None:
        self.serial = serial
        self.num_compactions = 0
        # First positions that the request may not rewrite.
        self.prompt_len = _prompt_len(req) if restored_prompt_len is None else restored_prompt_len
        self.update(req, first_slot)

    def update(self, req: Any, first_slot: int, num_fresh: int = 0) -> None:
        self.first_slot = first_slot
        # Slots taken since the last look: one may have been this request's own before a compaction.
        self.num_fresh = num_fresh
        self.allocated_len = req.kv.kv_allocated_len
        self.decode_batch_idx = req.decode_batch_idx


class Probe:
    """The watcher of one scheduler. Called before and after each scheduling decision, and when idle."""

    def __init__(self, scheduler: Any) -> None:
        import torch
        from rkv_faults import Fault
        from rkv_shadow import PoolShadow
        from sglang.srt.runtime_context import get_parallel

        self._scheduler = scheduler
        self._allocator = scheduler.token_to_kv_pool_allocator
        self._rows = scheduler.req_to_token_pool
        self._tree = scheduler.tree_cache
        self._page_size: int = self._allocator.page_size
        self._total: int = self._allocator.size
        kv_pool = self._allocator.get_kvcache()
        self._device = torch.device(kv_pool.device)
        self._moves_nothing = "RKV_PROBE_MOVES_NOTHING" in os.environ
        buffers = kv_pool.kv_buffer if hasattr(kv_pool, "kv_buffer") else [*kv_pool.k_buffer, *kv_pool.v_buffer]
        self._shadow = PoolShadow(buffers, self._moves_nothing)
        self._num_slots: int = buffers[0].shape[0]
        for name in ("free", "free_segment"):
            setattr(self._allocator, name, partial(self._note_free, getattr(self._allocator, name)))
        # id(req) -> the request itself too, so that the id stays its own.
        self._held: dict[int, tuple[Any, _Held]] = {}
        self._last_serial = 0
        self._kept_prompt_len: dict[str, int] = {}
        self._step = 0
        self._is_idle = False
        self.num_retractions = 0
        # Gets every line instead of the file, where a test's code runs in the scheduler process too.
        self.listener: Callable[[dict[str, Any]], None] | None = None
        self._rows_at_start = self._rows.available_size()
        self._max_private = int(os.environ.get("RKV_PROBE_MAX_PRIVATE") or 2**31)
        self._max_locked = int(os.environ.get("RKV_PROBE_MAX_LOCKED") or 0)
        self._fault = Fault.from_environment()
        path = os.environ["RKV_PROBE_FILE"] + (f".rank{rank}" if (rank := get_parallel().tp_rank) else "")
        # Line-buffered: a scheduler that dies takes no line with it.
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - lives as long as the process
        self._write(
            event="start",
            total=self._total,
            page_size=self._page_size,
            num_layers=kv_pool.layer_num,
            rows=self._rows_at_start,
            tree=type(getattr(self._tree, "tree_core", self._tree)).__name__,
        )

    def _write(self, **line: Any) -> None:
        if self.listener is not None:
            self.listener(line)
            return
        self._file.write(json.dumps(line) + "\n")

    def _violation(self, kind: str, **detail: Any) -> None:
        self._write(violation=kind, step=self._step, forward_ct=self._scheduler.forward_ct, **detail)

    def _note_free(self, free: Callable[..., None], slots: Any, **kwargs: Any) -> None:
        # By the page, as the allocator does.
        pages = slots.cpu().long().unique() // self._page_size
        for offset in range(self._page_size):
            self._shadow.forget_tree((pages * self._page_size + offset).numpy())
        free(slots, **kwargs)

    def before_scheduling(self) -> None:
        """All forwards up to now have run (on a CPU; a GPU is waited for): every held slot is written."""
        scheduler = self._scheduler
        self._step += 1
        if self._is_idle and not scheduler.waiting_queue and self._tree_size() == self._idle_tree_size:
            return
        self._check([scheduler.running_batch, scheduler.last_batch], is_after_scheduling=False)

    def after_scheduling(self, plan: Any) -> None:
        """Compactions, evictions, retractions and allocations of this step are done; its forward has not begun."""
        scheduler = self._scheduler
        if self._is_idle and plan.batch_to_run is None and not scheduler.waiting_queue:
            return
        self._is_idle = False
        batches = [plan.running_batch, plan.batch_to_run, scheduler.last_batch]
        reqs, slots_of = self._check(batches, is_after_scheduling=True)
        if plan.batch_to_run is None:
            return
        self._write(
            event="step",
            step=self._step,
            forward_ct=scheduler.forward_ct,
            mode=plan.batch_to_run.forward_mode.name,
            batch=[req.rid for req in plan.batch_to_run.reqs],
            running=[
                {
                    "rid": req.rid,
                    "prompt_len": _prompt_len(req),
                    "output_len": len(req.output_ids),
                    "allocated_len": req.kv.kv_allocated_len,
                    "committed_len": req.kv.kv_committed_len,
                    "protected_len": req.kv.cache_protected_len,
                    "private_slots": self._page_size
                    * -(-(len(slots_of[id(req)]) - req.kv.cache_protected_len) // self._page_size),
                    "decode_batch_idx": req.decode_batch_idx,
                    "compactions": self._held[id(req)][1].num_compactions,
                    "retractions": req.retraction_count,
                }
                for req in reqs
            ],
            waiting=len(scheduler.waiting_queue),
            available=self._allocator.available_size(),
            evictable=self._tree.evictable_size(),
            protected=self._tree.protected_size(),
            total=self._total,
            retractions=self.num_retractions,
        )
        if self._fault is not None and self._fault.is_due(self._step):
            written = [slots_of[id(req)][req.kv.cache_protected_len :][:1] for req in reqs if req.decode_batch_idx > 1]
            if self._fault.inject(self._allocator, self._shadow.slots_of_tree(), written):
                self._write(event="fault", step=self._step, fault=self._fault.kind)
                self._fault = None

    def _requests(self, batches: list[Any]) -> list[Any]:
        # Under overlap a request whose last token is in flight has left every batch but the one in this queue.
        in_flight = [batch for batch, _ in getattr(self._scheduler, "result_queue", ())]
        candidates = [req for batch in [*batches, *in_flight] if batch is not None for req in batch.reqs]
        if self._scheduler.chunked_req is not None:
            candidates.append(self._scheduler.chunked_req)
        return list({id(req): req for req in candidates if req.kv.holds_kv}.values())

    def _first_slot(self, req: Any) -> int:
        return int(self._rows.req_to_token[req.kv.req_pool_idx, 0])

    def _check(self, batches: list[Any], *, is_after_scheduling: bool) -> tuple[list[Any], dict[int, Any]]:
        """Look at everything; return the requests that hold KV, and by id(req) all slots of each."""
        import numpy as np
        import torch
        from rkv_census import census
        from rkv_shadow import NOBODY, TREE, private_holder

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        reqs = self._requests(batches)
        self._note_holders(reqs, is_after_scheduling)
        holder = np.zeros(self._num_slots, dtype=np.int64)
        tree_slots = self._tree.all_values_flatten().cpu().long().numpy()
        holder[tree_slots] = TREE
        rows = self._rows.req_to_token.cpu().numpy()
        slots_of = {id(req): rows[req.kv.req_pool_idx, : req.kv.kv_allocated_len].astype(np.int64) for req in reqs}
        for req in reqs:
            if not (holder[slots_of[id(req)][: req.kv.cache_protected_len]] == TREE).all():
                self._violation(
                    "protected prefix not in the tree", rid=req.rid, protected_len=req.kv.cache_protected_len
                )
        private_pages = {}
        for req in reqs:
            private, held = slots_of[id(req)][req.kv.cache_protected_len :], self._held[id(req)][1]
            holder[private] = private_holder(held.serial, req.kv.cache_protected_len, req.kv.kv_allocated_len)
            holder[private[len(private) - held.num_fresh :]] = NOBODY
            private_pages[req.rid] = private[:: self._page_size] // self._page_size
        for kind, detail in census(self._allocator, tree_slots, private_pages):
            self._violation(kind, **detail)
        changed = self._shadow.compare(holder)
        if changed:
            names = {f"#{held.serial} ": f"{req.rid} " for req, held in self._held.values()}
            for entry in changed[:_MAX_LISTED]:
                for serial, rid in names.items():
                    entry["holder"] = entry["holder"].replace(serial, rid)
            self._violation(
                "contents",
                during="scheduling" if is_after_scheduling else "forward",
                num_slots=len(changed),
                slots=changed[:_MAX_LISTED],
            )
        if not is_after_scheduling:
            self._shadow.record(holder)
        return reqs, slots_of

    def _note_holders(self, reqs: list[Any], is_after_scheduling: bool) -> None:
        held_now: dict[int, tuple[Any, _Held]] = {}
        for req in reqs:
            if id(req) not in self._held:
                self._last_serial += 1
                # One that comes back with what it had kept has no more of its prompt than then.
                is_restored = getattr(getattr(req, "rkv_state", None), "evicted_tokens", 0) > 0
                kept = self._kept_prompt_len.get(req.rid) if is_restored else None
                held_now[id(req)] = (req, _Held(self._last_serial, req, self._first_slot(req), kept))
                continue
            held = self._held[id(req)][1]
            held_now[id(req)] = (req, held)
            num_decodes = req.decode_batch_idx - held.decode_batch_idx
            # A chunk of a prompt may get what the chunk before it gave back because the tree had the same.
            num_fresh = max(num_decodes, req.kv.kv_allocated_len - held.allocated_len)
            if req.kv.kv_allocated_len < held.allocated_len + num_decodes:
                self._note_compaction(req, held, num_decodes, is_after_scheduling)
            held.update(req, self._first_slot(req), num_fresh)
        self._held = held_now
        if is_after_scheduling:
            self._check_max_private()

    def _note_compaction(self, req: Any, held: _Held, num_decodes: int, is_after_scheduling: bool) -> None:
        prompt_len = _prompt_len(req)
        held.num_compactions += 1
        to_len = req.kv.kv_allocated_len - num_decodes
        # Only a prompt's compaction gives a running request another first slot. From then on it may not be written.
        is_of_prompt = self._first_slot(req) != held.first_slot
        if is_of_prompt:
            # Of what had come back, some may have gone with it.
            held.prompt_len = prompt_len - req.rkv_state.evicted_prompt_tokens
        self._kept_prompt_len[req.rid] = held.prompt_len
        line = {"rid": req.rid, "prompt_len": prompt_len, "output_len": len(req.output_ids)}
        line |= {"from_len": held.allocated_len, "to_len": to_len, "of_prompt": is_of_prompt}
        self._write(event="compaction", step=self._step, forward_ct=self._scheduler.forward_ct, **line)
        if not is_after_scheduling:
            self._violation("compaction outside scheduling", **line)
        if not self._moves_nothing:  # The owner may rewrite what it generated; its prompt stays watched.
            self._shadow.forget_positions(held.serial, held.prompt_len)

    def _check_max_private(self) -> None:
        for req, held in self._held.values():
            # A retracted request is prefilled again at its full length, until its next compaction.
            is_refilled = req.retraction_count > 0 or _prompt_len(req) < len(req.origin_input_ids)
            is_refilled = is_refilled and held.num_compactions == 0
            num_private = req.kv.kv_allocated_len - _prompt_len(req)
            if num_private > self._max_private and not is_refilled:
                self._violation("private", rid=req.rid, num_private=num_private, allowed=self._max_private)

    def _tree_size(self) -> int:
        return self._tree.evictable_size() + self._tree.protected_size()

    def idle(self) -> None:
        """Once per idle spell: everything but the tree's evictable slots is free again."""
        scheduler = self._scheduler
        if self._is_idle or not scheduler.is_fully_idle():
            return
        self._check([scheduler.running_batch, scheduler.last_batch], is_after_scheduling=False)
        self._is_idle = True
        self._idle_tree_size = self._tree_size()
        line = {
            "available": self._allocator.available_size(),
            "evictable": self._tree.evictable_size(),
            "protected": self._tree.protected_size(),
            "total": self._total,
            "rows": self._rows.available_size(),
            "rows_at_start": self._rows_at_start,
            "retractions": self.num_retractions,
        }
        # What named prefixes hold is locked for as long as they are there.
        num_locked = line["protected"] if line["protected"] <= self._max_locked else 0
        is_whole = (
            line["available"] + line["evictable"] + num_locked == line["total"]
            and line["rows"] == line["rows_at_start"]
        )
        self._write(event="idle", step=self._step, forward_ct=scheduler.forward_ct, ok=is_whole, **line)
        if not is_whole:
            self._violation("idle pool", **line)
