"""Which chunks of one file are there, who brought each, and what it hashed to. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from meshd.cache.chunks import CHUNK_BYTES, chunk_count, chunk_span


class Holdings:
    def __init__(self, size: int) -> None:
        self.size = size
        self.chunks = chunk_count(size)
        self._have = bytearray(self.chunks)
        self._digests: dict[int, bytes] = {}
        self._brought_by: dict[int, str] = {}
        self._storing: dict[int, tuple[str, bytes]] = {}
        self._dropped: list[int] = []

    @property
    def complete(self) -> bool:
        return self._have.find(0) < 0

    @property
    def storing(self) -> bool:
        """Some chunk is being written."""
        return bool(self._storing)

    @property
    def missing_bytes(self) -> int:
        missing = self._have.count(0) * CHUNK_BYTES
        last = self.chunks - 1
        return missing - (0 if self._have[last] else CHUNK_BYTES - chunk_span(last, self.size)[1])

    def __contains__(self, index: int) -> bool:
        """Whether it is on disk."""
        return bool(self._have[index])

    def __iter__(self) -> Iterator[tuple[int, str, bytes]]:
        """Chunk, who brought it, its hash; of those on disk. May be changed meanwhile."""
        for index, digest in tuple(self._digests.items()):
            if index in self:
                yield index, self._brought_by[index], digest

    def is_missing(self, index: int) -> bool:
        """Neither on disk nor being written."""
        return not self._have[index] and index not in self._storing

    def digest(self, index: int) -> bytes:
        return self._digests[index]

    def brought_by(self, index: int) -> str | None:
        return self._brought_by.get(index)

    def take(self, index: int, source: str, digest: bytes) -> None:
        """It is on disk."""
        self._have[index] = 1
        self._digests[index] = digest
        self._brought_by[index] = source

    def begin_storing(self, index: int, source: str, digest: bytes) -> None:
        self._storing[index] = (source, digest)

    def end_storing(self, index: int) -> tuple[str, bytes]:
        """Who brought it, and its hash; it is for the caller to `take` it."""
        return self._storing.pop(index)

    def drop(self, index: int) -> bool:
        """It counts no more. Whether it did."""
        if not self._have[index]:
            return False
        self._have[index] = 0
        del self._digests[index], self._brought_by[index]
        self._dropped.append(index)
        return True

    def take_dropped(self) -> tuple[int, ...]:
        """Those that were dropped since the last call."""
        dropped, self._dropped = tuple(self._dropped), []
        return dropped
