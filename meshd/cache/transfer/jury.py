"""Whose hashes of chunks are believed. Pure.

Own ones (made when this machine verified the file whole) are believed before anybody's. Else the
list most sources agree on; of equally many, the one that was believed before, then the first heard.
A list that was shown to lie is never believed again.
"""

from __future__ import annotations

from collections import Counter

from meshd.cache.chunks import HASH_BYTES


class Jury:
    def __init__(self, chunks: int, own: bytes | None = None) -> None:
        """`own`: 32 bytes a chunk; ignored when it is of another length."""
        self._length = chunks * HASH_BYTES
        self._lists: dict[str, bytes] = {}
        self._liars: set[bytes] = set()
        self._own = own is not None and len(own) == self._length
        self.believed: bytes | None = own if self._own else None
        """The list chunks are held against; None while nobody gave one."""

    def hear(self, source: str, hashes: bytes) -> bool:
        """`source` says what the chunks hash to. False: of the wrong length, or known to lie."""
        if len(hashes) != self._length or hashes in self._liars:
            return False
        self._lists[source] = hashes
        self._choose()
        return True

    def dismiss(self, source: str) -> None:
        """What `source` says counts no more: it lied about something."""
        if self._lists.pop(source, None) is not None:
            self._choose()

    def discredit(self) -> tuple[str, ...]:
        """The believed list is wrong. Who gave it; nobody if it was this machine's own."""
        if self.believed is None:
            return ()
        self._liars.add(self.believed)
        said = tuple(name for name, told in self._lists.items() if told == self.believed)
        for name in said:
            del self._lists[name]
        self._own = False
        self.believed = None
        self._choose()
        return said

    def expected(self, index: int) -> bytes | None:
        """The believed hash of a chunk."""
        return _hash_of(self.believed, index)

    def promised(self, source: str, index: int) -> bytes | None:
        """The hash of a chunk by `source`'s own list."""
        return _hash_of(self._lists.get(source), index)

    def dissents(self, source: str) -> bool:
        """Whether `source` promises other bytes than are believed to be right."""
        told = self._lists.get(source)
        return self.believed is not None and told is not None and told != self.believed

    def _choose(self) -> None:
        if self._own or not self._lists:
            return
        votes = Counter(self._lists.values())
        most = max(votes.values())
        if self.believed is None or votes[self.believed] < most:
            self.believed = next(told for told in self._lists.values() if votes[told] == most)


def _hash_of(hashes: bytes | None, index: int) -> bytes | None:
    if hashes is None:
        return None
    return hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
