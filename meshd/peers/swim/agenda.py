"""What a machine wants to be woken for: alarms by key, each at most once."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

SLACK = 64
"""Entries of the heap that may be out of date before it is built anew."""


class Agenda(Generic[K]):
    """Setting a key again moves its alarm. Times are monotonic seconds.

    A heap whose outdated entries are passed over; it holds at most twice what is set, and `SLACK`.
    """

    def __init__(self) -> None:
        self._at: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._count = 0

    def set(self, key: K, at: float) -> None:
        self._at[key] = at
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, key))
        if len(self._heap) > 2 * len(self._at) + SLACK:
            self._rebuild()

    def cancel(self, key: K) -> None:
        self._at.pop(key, None)

    def due(self) -> float | None:
        """The earliest alarm."""
        self._drop_outdated()
        return self._heap[0][0] if self._heap else None

    def try_take(self, now: float) -> K | None:
        """The earliest alarm that is due, which is not set any more then; None if none is."""
        self._drop_outdated()
        if not self._heap or self._heap[0][0] > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._at[key]
        return key

    def postpone(self, by_s: float) -> None:
        """Move every alarm."""
        self._at = {key: at + by_s for key, at in self._at.items()}
        self._rebuild()

    def _drop_outdated(self) -> None:
        while self._heap and self._at.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)

    def _rebuild(self) -> None:
        self._heap = [(at, n, key) for n, (key, at) in enumerate(self._at.items())]
        heapq.heapify(self._heap)
        self._count = len(self._heap)
