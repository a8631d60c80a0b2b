"""Those who may bring chunks of one file: what each has, and who brings no more. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from meshd.cache.transfer.flights import Span


@dataclass(slots=True)
class _Source:
    asked: bool = False
    """It said what it has."""
    out: str | None = None
    """Why it brings nothing more; None while it may."""
    banned: bool = False
    has: bytearray | None = None
    """1 for each chunk it can bring; None for all."""


class Roster:
    def __init__(self, chunks: int, sources: Iterable[str]) -> None:
        self._chunks = chunks
        self._sources = {name: _Source() for name in sources}

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def is_out(self, source: str) -> bool:
        """Also of one that never was in."""
        return source not in self._sources or self._sources[source].out is not None

    def is_banned(self, source: str) -> bool:
        return self._sources[source].banned

    def is_new(self, source: str) -> bool:
        """Whether it has still to say what it has."""
        state = self._sources[source]
        return state.out is None and not state.asked

    def has_all(self, source: str) -> bool:
        state = self._sources[source]
        return state.asked and state.has is None

    def why_out(self) -> dict[str, str]:
        return {name: s.out for name, s in self._sources.items() if s.out is not None}

    def offered(self, source: str, has: bytes | None) -> None:
        """What it has, one bit a chunk, lowest first; None: all."""
        state = self._sources[source]
        state.asked = True
        state.has = None if has is None else _unpack(has, self._chunks)

    def lacks(self, source: str, span: Span) -> None:
        state = self._sources[source]
        if state.has is None:
            state.has = bytearray(b"\1") * self._chunks
        state.has[span.first : span.first + span.count] = bytes(span.count)

    def gone(self, source: str, reason: str) -> None:
        """It brings nothing more; the first reason stays."""
        state = self._sources[source]
        state.out = state.out or reason

    def ban(self, source: str, reason: str) -> None:
        """Neither does it, nor does what it brought count."""
        state = self._sources[source]
        state.banned = True
        state.out = reason

    def allowed(self, source: str, barred: Collection[int]) -> bytes | None:
        """1 for each chunk it has, but for those `barred`; None for all."""
        has = self._sources[source].has
        if not barred:
            return None if has is None else bytes(has)
        allowed = bytearray(b"\1") * self._chunks if has is None else bytearray(has)
        for index in barred:
            allowed[index] = 0
        return bytes(allowed)


def _unpack(bits: bytes, chunks: int) -> bytearray:
    """One byte a chunk, 0 or 1, out of one bit a chunk, lowest first."""
    number = int.from_bytes(bits, "little")
    text = f"{number:0{chunks}b}"[::-1][:chunks]
    return bytearray(text.encode().translate(_BITS))


_BITS: Final = bytes.maketrans(b"01", b"\0\1")
