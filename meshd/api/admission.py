"""Who may go now: a fair, bounded queue per model in front of the engines' slots.

A pure machine. Every request that arrives gets exactly one outcome, `Granted` or `Refused`, unless
its client leaves first (`RequestAbandoned`), which is its outcome. A granted one that needed a slot
holds it until `RequestFinished`.

What happens to a request that arrives, in this order:

1. The model is closed (failed, gone): refused with that reason.
2. The model is not ready: it waits if it asked to (`wait_until` in the future), else NOT_READY.
3. It needs no slot: granted.
4. A slot is free and nobody waits: granted.
5. The queue is full: QUEUE_FULL. Otherwise it waits for a slot until `deadline`.

Fairness: the queue is a ring of origins, each with a first-in-first-out line of its own; a slot
goes to the next origin that has somebody waiting. One origin that floods delays itself.

`arrive` and `finish` are the two events of every request; they may be called as methods, which
saves the hot path an object and a dispatch (see relay.py).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias, assert_never

from meshd.ids import ModelId
from meshd.kernel.machine import Tick

Key: TypeAlias = Hashable
"""Names one request; equal only to itself."""

STALE_DEADLINES = 64
"""Deadlines of requests that no longer wait which are tolerated before they are swept out."""


class Refusal(StrEnum):
    QUEUE_FULL = "queue_full"
    NOT_READY = "not_ready"
    """The model is loading, or stopped being ready, and the request would not wait (longer)."""
    FAILED = "failed"
    GONE = "gone"
    DEADLINE = "deadline"


# -- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestArrived:
    key: Key
    model: ModelId
    origin: str
    """Whose turn it counts as; for example the client's address."""
    needs_slot: bool
    """False for calls the engine answers beside its slots (`/tokenize`)."""
    wait_until: float
    """Monotonic: until when it would wait for a model that is not ready; the past for "not"."""
    deadline: float
    """Monotonic: until when it may wait in all."""


@dataclass(frozen=True, slots=True)
class RequestFinished:
    key: Key
    """A granted request ended, whichever way; its slot is free."""


@dataclass(frozen=True, slots=True)
class RequestAbandoned:
    key: Key
    """The client left; the request may be waiting, granted, or already over."""


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    model: ModelId
    slots: int | None
    """Slots of all engines together; None: not ready."""


@dataclass(frozen=True, slots=True)
class ModelClosed:
    model: ModelId
    reason: Refusal
    """FAILED or GONE; lasts until the next CapacityChanged."""


Event: TypeAlias = (
    RequestArrived | RequestFinished | RequestAbandoned | CapacityChanged | ModelClosed | Tick
)


# -- effects --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Granted:
    key: Key


@dataclass(slots=True)
class Refused:
    key: Key
    reason: Refusal


Effect: TypeAlias = Granted | Refused


# -- the machine ----------------------------------------------------------------------------------


class Waiting:
    __slots__ = ("deadline", "key", "needs_slot", "origin", "queue", "wait_until")

    def __init__(
        self,
        key: Key,
        queue: Queue,
        origin: str,
        needs_slot: bool,
        wait_until: float,
        deadline: float,
    ) -> None:
        self.key = key
        self.queue = queue
        self.origin = origin
        self.needs_slot = needs_slot
        self.wait_until = wait_until
        self.deadline = deadline

    def due(self) -> float:
        if self.queue.slots is None:
            return min(self.wait_until, self.deadline)
        return self.deadline


@dataclass(slots=True, eq=False)
class Queue:
    """One model. `lines` is the ring of origins; the first is the next to be served."""

    slots: int | None = None
    closed: Refusal | None = None
    in_flight: int = 0
    waiting: int = 0
    lines: OrderedDict[str, OrderedDict[Key, Waiting]] = field(default_factory=OrderedDict)

    def put(self, entry: Waiting) -> None:
        line = self.lines.get(entry.origin)
        if line is None:
            line = self.lines[entry.origin] = OrderedDict()
        line[entry.key] = entry
        self.waiting += 1

    def remove(self, entry: Waiting) -> None:
        line = self.lines[entry.origin]
        del line[entry.key]
        if not line:
            del self.lines[entry.origin]
        self.waiting -= 1

    def next_in_turn(self) -> Waiting:
        """Whose turn it is; their origin goes to the end of the ring."""
        origin, line = next(iter(self.lines.items()))
        self.lines.move_to_end(origin)
        return next(iter(line.values()))

    def everybody(self) -> list[Waiting]:
        return [entry for line in self.lines.values() for entry in line.values()]


class Admission:
    """See the module's docstring. `queue_limit`: requests that may wait, per model."""

    def __init__(self, queue_limit: int) -> None:
        self._queue_limit = queue_limit
        self._queues: dict[ModelId, Queue] = {}
        self._waiting: dict[Key, Waiting] = {}
        self._holding: dict[Key, Queue] = {}
        self._dues: list[tuple[float, int, Waiting]] = []
        self._sequence = 0

    def handle(self, event: Event, now: float) -> Sequence[Effect]:
        match event:
            case RequestArrived():
                return self.arrive(
                    event.key,
                    event.model,
                    event.origin,
                    event.needs_slot,
                    event.wait_until,
                    event.deadline,
                    now,
                )
            case RequestFinished():
                return self.finish(event.key)
            case RequestAbandoned():
                return self.abandon(event.key)
            case CapacityChanged():
                return self._set_capacity(event.model, event.slots, now)
            case ModelClosed():
                return self._close(event.model, event.reason)
            case Tick():
                return self._expire(now)
            case _:
                assert_never(event)

    def due(self) -> float | None:
        dues = self._dues
        while dues and dues[0][2].key not in self._waiting:
            heapq.heappop(dues)
        return dues[0][0] if dues else None

    def arrive(
        self,
        key: Key,
        model: ModelId,
        origin: str,
        needs_slot: bool,
        wait_until: float,
        deadline: float,
        now: float,
    ) -> Sequence[Effect]:
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = Queue()
        if queue.closed is not None:  # 1
            return (Refused(key, queue.closed),)
        slots = queue.slots
        if slots is None:  # 2
            if wait_until <= now:
                return (Refused(key, Refusal.NOT_READY),)
        elif not needs_slot:  # 3
            return (Granted(key),)
        elif queue.in_flight < slots and not queue.waiting:  # 4
            queue.in_flight += 1
            self._holding[key] = queue
            return (Granted(key),)
        if queue.waiting >= self._queue_limit:  # 5
            return (Refused(key, Refusal.QUEUE_FULL),)
        entry = Waiting(key, queue, origin, needs_slot, wait_until, deadline)
        queue.put(entry)
        self._waiting[key] = entry
        self._note_due(entry)
        return ()

    def finish(self, key: Key) -> Sequence[Effect]:
        queue = self._holding.pop(key, None)
        if queue is None:
            return ()
        queue.in_flight -= 1
        return self._serve(queue) if queue.waiting else ()

    def abandon(self, key: Key) -> Sequence[Effect]:
        entry = self._waiting.pop(key, None)
        if entry is None:
            return self.finish(key)
        entry.queue.remove(entry)
        return ()

    def in_flight(self, model: ModelId) -> int:
        """Slots of `model` held by granted requests."""
        queue = self._queues.get(model)
        return 0 if queue is None else queue.in_flight

    def waiting(self, model: ModelId) -> int:
        queue = self._queues.get(model)
        return 0 if queue is None else queue.waiting

    # -- steps ------------------------------------------------------------------------------------

    def _set_capacity(self, model: ModelId, slots: int | None, now: float) -> Sequence[Effect]:
        queue = self._queues.setdefault(model, Queue())
        was_ready = queue.slots is not None
        queue.slots = slots
        queue.closed = None
        if slots is not None:
            if was_ready:
                return self._serve(queue)
            free = [e for e in queue.everybody() if not e.needs_slot]
            self._take_out(free)
            self._renew_dues(queue)
            return [*(Granted(e.key) for e in free), *self._serve(queue)]
        effects = self._refuse_those(
            [e for e in queue.everybody() if e.wait_until <= now], Refusal.NOT_READY
        )
        self._renew_dues(queue)
        return effects

    def _close(self, model: ModelId, reason: Refusal) -> Sequence[Effect]:
        queue = self._queues.setdefault(model, Queue())
        queue.slots = None
        queue.closed = reason
        effects = self._refuse_those(queue.everybody(), reason)
        if reason is Refusal.GONE and not queue.in_flight:
            del self._queues[model]
        return effects

    def _serve(self, queue: Queue) -> Sequence[Effect]:
        slots = queue.slots
        if slots is None:
            return ()
        effects: list[Effect] = []
        while queue.waiting and queue.in_flight < slots:
            entry = queue.next_in_turn()
            queue.remove(entry)
            del self._waiting[entry.key]
            queue.in_flight += 1
            self._holding[entry.key] = queue
            effects.append(Granted(entry.key))
        return effects

    def _expire(self, now: float) -> Sequence[Effect]:
        effects: list[Effect] = []
        while (due := self.due()) is not None and due <= now:
            entry = heapq.heappop(self._dues)[2]
            if entry.due() > now:
                continue  # it waits for something else by now, and is noted with that time too
            del self._waiting[entry.key]
            entry.queue.remove(entry)
            late = entry.queue.slots is not None or entry.deadline <= now
            effects.append(Refused(entry.key, Refusal.DEADLINE if late else Refusal.NOT_READY))
        return effects

    def _refuse_those(self, entries: list[Waiting], reason: Refusal) -> list[Effect]:
        self._take_out(entries)
        return [Refused(entry.key, reason) for entry in entries]

    def _take_out(self, entries: list[Waiting]) -> None:
        for entry in entries:
            del self._waiting[entry.key]
            entry.queue.remove(entry)

    def _renew_dues(self, queue: Queue) -> None:
        for entry in queue.everybody():
            self._note_due(entry)

    def _note_due(self, entry: Waiting) -> None:
        dues = self._dues
        if len(dues) > 2 * len(self._waiting) + STALE_DEADLINES:
            # Entries that were granted or left keep their place in the heap until then.
            dues[:] = [(e.due(), n, e) for _, n, e in dues if e.key in self._waiting]
            heapq.heapify(dues)
        self._sequence += 1
        heapq.heappush(dues, (entry.due(), self._sequence, entry))
