"""Who is bringing which chunks of one file. Pure.

Spans of chunks are handed out so that nothing is brought twice without need:

1. A span is a run of chunks that nobody brings yet, at most as long as its source likes and no
   longer than its share of what is left, so that all sources end at about the same time.
2. The hub starts where it is told to, everybody else at the front: the front is what the hash of
   the whole file waits for.
3. When nothing is left to hand out, an idle source takes the later half of the longest span that
   has been under way for `YOUNG_S` or more.
4. A chunk whose bringer has been silent for `PATIENCE_S`, and for several times as long as chunks
   took lately, may be brought by one other source too. On a slow line that never happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

YOUNG_S: Final = 1.0
PATIENCE_S: Final = 2.0
PATIENCE_FACTOR: Final = 4.0


@dataclass(frozen=True, slots=True)
class Span:
    """Chunks `first` to `first + count - 1`, for the one who asked."""

    token: int
    first: int
    count: int


@dataclass(slots=True)
class _Flight:
    source: str
    at: int
    """The next chunk to come."""
    stop: int
    taken_at: float
    heard_at: float

    def __contains__(self, index: int) -> bool:
        return self.at <= index < self.stop


class Flights:
    def __init__(self, chunks: int, streams: int) -> None:
        """`streams`: how many bring at the same time, about."""
        self._chunks = chunks
        self._streams = max(1, streams)
        self._free = bytearray(b"\1") * chunks
        """1 for a chunk that is wanted and that nobody brings."""
        self._flights: dict[int, _Flight] = {}
        self._doubled: set[int] = set()
        self._tokens = 0
        self._typical_s = 0.0
        """What a chunk takes; slow ones count at once and are forgotten slowly."""

    @property
    def under_way(self) -> bool:
        return bool(self._flights)

    def source_of(self, token: int) -> str:
        return self._flights[token].source

    def want(self, indices: Iterable[int]) -> None:
        """These are to be brought (again)."""
        for index in indices:
            self._doubled.discard(index)
            if not self._brought(index):
                self._free[index] = 1

    def got(self, indices: Iterable[int]) -> None:
        """These need not be brought any more."""
        for index in indices:
            self._free[index] = 0
            self._doubled.discard(index)

    def next(
        self, source: str, allowed: bytes | None, longest: int, start: int, now: float
    ) -> Span | None:
        """A span for `source` by rules 1 and 2. `allowed`: 1 for each chunk it may bring; None for
        all. `start`: where it looks first."""
        free = self._free if allowed is None else _both(self._free, allowed)
        first = free.find(1, start)
        if first < 0 and (first := free.find(1)) < 0:
            return None
        share = -(-self._free.count(1) // (2 * self._streams))
        stop = min(first + min(longest, share), self._chunks)
        gap = free.find(0, first, stop)
        return self._depart(source, first, stop if gap < 0 else gap, now)

    def share(self, source: str, allowed: bytes | None, now: float) -> Span | None:
        """A span for `source`, which has nothing else to do, by rules 3 and 4."""

        def may(index: int) -> bool:
            return allowed is None or bool(allowed[index])

        by_length = sorted(self._flights.values(), key=lambda f: f.at - f.stop)
        for flight in by_length:
            middle = (flight.at + flight.stop + 1) // 2
            if now - flight.taken_at < YOUNG_S or flight.stop - middle < 1:
                continue
            if all(may(index) for index in range(middle, flight.stop)):
                stop, flight.stop = flight.stop, middle
                return self._depart(source, middle, stop, now)
        patience_s = max(PATIENCE_S, PATIENCE_FACTOR * self._typical_s)
        for flight in by_length:
            index = flight.at
            if now - flight.heard_at < patience_s or index >= flight.stop:
                continue
            if index not in self._doubled and may(index):
                self._doubled.add(index)
                return self._depart(source, index, index + 1, now)
        return None

    def covers(self, token: int, index: int) -> bool:
        """Whether the holder of `token` is still the one to bring chunk `index`."""
        return index in self._flights[token]

    def arrived(self, token: int, index: int, now: float) -> None:
        """The holder brought chunk `index`, for better or worse."""
        flight = self._flights[token]
        self._typical_s = max(now - flight.heard_at, 0.9 * self._typical_s)
        flight.heard_at = now
        flight.at = max(flight.at, index + 1)

    def end(self, token: int) -> range:
        """The holder brings no more. What it did not bring."""
        flight = self._flights.pop(token)
        return range(flight.at, max(flight.at, flight.stop))

    def _brought(self, index: int) -> bool:
        return any(index in flight for flight in self._flights.values())

    def _depart(self, source: str, first: int, stop: int, now: float) -> Span:
        self._tokens += 1
        self._free[first:stop] = bytes(stop - first)
        self._flights[self._tokens] = _Flight(source, first, stop, now, now)
        return Span(self._tokens, first, stop - first)


def _both(a: bytes | bytearray, b: bytes) -> bytes:
    both = int.from_bytes(a, "little") & int.from_bytes(b, "little")
    return both.to_bytes(len(a), "little")
